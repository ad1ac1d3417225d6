"""What `--debug` turns on of torch's own tools."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lhcp.training import debugging

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys
from pathlib import Path
import torch, torch.distributed as dist
from lhcp.training.debugging import record_messages, write_messages
from lhcp.training.process import join

record_messages()
own = join(30.0)
dist.all_reduce(torch.ones(3))
print(write_messages(Path(sys.argv[1]), own.rank))
"""


def test_messages_are_recorded_and_written(tmp_path: Path) -> None:
    """Fails if the recorder is turned on too late, or what it has is not where it is said."""
    # Some torches record without being told to.
    environment = os.environ | {"TORCH_NCCL_TRACE_BUFFER_SIZE": "5"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    path = tmp_path / "messages_rank0.json"
    assert done.stdout.strip() == str(path), done.stderr
    (entry,) = json.loads(path.read_text())["entries"]
    assert "all_reduce" in entry["profiling_name"]


def test_a_server_that_lacks_a_package_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a run that is to be debugged ends for want of a package, or says nothing."""
    monkeypatch.setattr(debugging, "NEEDS", ("torch", "no_such_package"))
    assert debugging.serve_messages() == (
        "debug: no server, which needs torch, no_such_package: pip install no_such_package"
    )
