"""What a process of a run leaves to its launcher."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lhcp.training import process
from lhcp.training.process import Process, run_to_exit, watched


def fail(own: Process) -> None:
    raise ValueError("a reason")


def test_torchruns_summary_has_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if torchrun says that a rank ended with status 1, and not of what."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    with pytest.raises(ValueError, match="a reason"):
        watched(fail, Process(0, 1, torch.device("cpu")), 5.0, None)
    assert json.loads(file.read_text())["message"]["message"] == "ValueError: a reason"


def compile_until_told(own: Process) -> None:
    """Wait for a compiler that the signal to stop ends."""
    script = "import os, signal; os.kill(os.getpid(), signal.SIGUSR1)"
    try:
        subprocess.run([sys.executable, "-c", script], check=True)
    except subprocess.CalledProcessError as error:
        raise RuntimeError("of torch.compile") from error


def test_a_compiler_that_is_stopped_too_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a job that is told to stop while it compiles ends as one that failed."""
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        raise SystemExit(code)

    monkeypatch.setattr(process, "leave", leave)
    monkeypatch.setattr(process, "join", lambda _: Process(0, 1, torch.device("cpu")))
    with pytest.raises(SystemExit):
        run_to_exit(compile_until_told)
    assert codes == [138]
    said = capsys.readouterr().err
    assert "stopped by SIGUSR1 while a step was being compiled" in said
    assert "Traceback" not in said
