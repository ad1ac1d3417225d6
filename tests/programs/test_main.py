"""The console program finds its commands, and says what it lacks."""

import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from lhcp.programs import main

COMMANDS = sorted(main.COMMANDS)


def test_every_command_has_its_file() -> None:
    """Fails if a command is named and not there, or there and not named."""
    files = {path.stem for path in Path(main.__file__).parent.glob("[a-z]*.py")}
    assert files - {"main"} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_the_commands_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main([name, "--help"])
    assert ended.value.code in (0, None)
    assert f"lhcp {name}" in capsys.readouterr().out


def test_without_a_command_all_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    main.main([])
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in COMMANDS)
    with pytest.raises(SystemExit, match=f"no such command; there are .*{COMMANDS[0]}"):
        main.main(["trian"])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a program without its extra ends in a traceback, or hides a mistake of ours."""
    real = PathFinder.find_spec
    lost = {"tyro", "lhcp.training.export"}

    def find(name: str, path: object = None, target: object = None) -> object:
        return None if name in lost else real(name, path, target)  # type: ignore[arg-type]

    monkeypatch.setattr(PathFinder, "find_spec", find)
    for name in [n for n in sys.modules if n.startswith(("tyro", "lhcp.programs.", *lost))]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit, match=r"lhcp calibrate needs the package tyro.*lhcp\[train\]"):
        main.main(["calibrate"])
    lost.remove("tyro")
    with pytest.raises(ModuleNotFoundError, match=r"lhcp\.training\.export"):
        main.main(["export"])
