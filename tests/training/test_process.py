"""What a process of a run leaves to its launcher."""

import json
from pathlib import Path

import pytest
import torch

from lhcp.training.process import Process, watched


def fail(own: Process) -> None:
    raise ValueError("a reason")


def test_torchruns_summary_has_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if torchrun says that a rank ended with status 1, and not of what."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    with pytest.raises(ValueError, match="a reason"):
        watched(fail, Process(0, 1, torch.device("cpu")), 5.0, None)
    assert json.loads(file.read_text())["message"]["message"] == "ValueError: a reason"
