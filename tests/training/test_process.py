"""What a process of a run leaves to its launcher."""

import json
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from lhcp.training import process
from lhcp.training.process import Process, watched
from lhcp.training.stopping import StoppedCompiling


def fail(own: Process) -> None:
    raise ValueError("a reason")


def test_torchruns_summary_has_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if torchrun says that a rank ended with status 1, and not of what."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    with pytest.raises(ValueError, match="a reason"):
        watched(fail, Process(0, 1, torch.device("cpu")), 5.0, None)
    assert json.loads(file.read_text())["message"]["message"] == "ValueError: a reason"


class Left(Exception):
    """In place of the end of the process."""


def stopped_compiling(own: Process) -> None:
    raise StoppedCompiling(signal.SIGUSR1, subprocess.CalledProcessError(-signal.SIGUSR1, "gcc"))


def test_a_run_stopped_as_it_compiles_goes_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if it waits for ranks that are in a message, or ends as a run that failed."""
    left: list[tuple[int, bool]] = []

    def leave(code: int, *, at_once: bool = False) -> None:
        left.append((code, at_once))
        raise Left

    monkeypatch.setattr(process, "leave", leave)
    with pytest.raises(Left):
        watched(stopped_compiling, Process(0, 1, torch.device("cpu")), 5.0, None)
    assert left == [(138, True)]
    said = capsys.readouterr().err
    assert "rank 0: stopped by SIGUSR1 in a step that waited for a compiler" in said
