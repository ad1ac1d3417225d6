"""CI, the commit hook and the package hold together: one script of static checks, and typed."""

from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOOLS = ("ruff", "mypy")


def commands(name: str) -> list[str]:
    """Return the lines of a file without comments and blank ones."""
    lines = (line.strip() for line in (ROOT / name).read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def test_ci_and_the_hook_run_one_script() -> None:
    """Fails if either names a tool itself, or no longer runs launch/check.sh."""
    ci, hook = commands(".ci/run"), commands(".pre-commit-config.yaml")
    assert "bash launch/check.sh" in ci
    assert "entry: launch/check.sh" in hook and sum("entry:" in line for line in hook) == 1
    assert not [line for line in ci + hook if any(tool in line for tool in TOOLS)]


def test_the_script_runs_every_check() -> None:
    """Fails if a check goes, or would change files instead of judging them."""
    checks = [line.split(" -m ")[1] for line in commands("launch/check.sh") if " -m " in line]
    assert checks == ["ruff check .", "ruff format --check .", "mypy"]


def test_the_workflow_runs_ci() -> None:
    workflow = commands(".github/workflows/ci.yml")
    assert "- run: .ci/run" in workflow and 'python-version: "3.11"' in workflow


def test_the_package_is_typed() -> None:
    """Fails without the marker: type checkers then ignore the library's hints."""
    assert (files("lhcp") / "py.typed").is_file()
