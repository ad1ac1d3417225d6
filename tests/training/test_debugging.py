"""What `--debug` turns on: of torch's own tools, and of the attention."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lhcp.training import debugging
from lhcp.training.data import open_data
from lhcp.training.parallel import build
from lhcp.training.placement import wants_graphs
from lhcp.training.run import Run
from lhcp.training.step import train_step
from tests.training.test_bad_numbers import RunRanks

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


def spoilt_attention(group: object, run: Run) -> str:
    """Take two steps, the second with a weight of one rank that is no number; what it says."""
    trainee = build(run, torch.device("cpu"))
    data = open_data(run.data, run.seqlen, run.seed)
    train_step(run, trainee, data.train, run.stages, 0)
    if trainee.placement.ranks.rank == 1:
        trainee.model.blocks[0].register_forward_pre_hook(
            lambda _, given: (given[0] * torch.nan, *given[1:])
        )
    with pytest.raises(ValueError) as error:
        train_step(run, trainee, data.train, run.stages, 1)
    return str(error.value)


def test_a_run_that_is_debugged_ends_where_numbers_go_bad(
    run_ranks: RunRanks, small_run: Run
) -> None:
    """Fails if --debug does not reach the layers, or a rank waits for the one that is bad."""
    run = replace(small_run, cp=2, debug=True)
    first, second = run_ranks(2, spoilt_attention, run)
    assert second.startswith("q of rank 1 of 2 has ") and second in first
    assert first.startswith("rank 1 of 2 cannot go on: ")


def test_a_run_that_is_debugged_takes_no_graphs(small_run: Run) -> None:
    """Fails if graphs hide calls that are to be looked at, or a choice is dropped in silence."""
    cuda = torch.device("cuda")
    assert [wants_graphs(replace(small_run, debug=debug), cuda) for debug in (False, True)] == [
        True,
        False,
    ]
    with pytest.raises(ValueError, match="graphs='on' with debug"):
        wants_graphs(replace(small_run, graphs="on", debug=True), cuda)
