"""One run in a folder: another is told who holds it, and a dead one holds nothing."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from lhcp.training.lock import held

HOLD = """
import sys, time
from pathlib import Path
import torch.distributed as dist
from lhcp.training.lock import held
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.usefixtures("one_rank")
def test_a_second_run_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    """Fails if two runs may write one folder, or a run that died keeps it."""
    folder = tmp_path / "deep" / "out"
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        for _ in range(2):
            with (
                pytest.raises(RuntimeError, match=rf"in use by .*process {other.pid} on .*--out"),
                held(folder),
            ):
                pass
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    with held(folder) as remark:
        assert remark == ""
    with held(folder):
        pass


def try_to_hold(group: object, folder: Path) -> str:
    """Return the error that this rank gets."""
    with pytest.raises(RuntimeError) as error, held(folder):
        pass
    return str(error.value)


def test_all_ranks_are_told(run_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    """Fails if a rank goes on alone."""
    with FileLock(tmp_path / "run.lock"):
        said = run_ranks(2, try_to_hold, tmp_path)
    assert said[0] == said[1] and "which has not written down who it is" in said[0]


@pytest.mark.usefixtures("one_rank")
def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with held(tmp_path) as remark:
        assert "has no locks" in remark
