"""Runs that are told to stop, interrupted, left without a reader, or whose ranks are killed."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lhcp.training.checkpoint_files import Record
from lhcp.training.history import StepRecord
from lhcp.training.run import Run
from lhcp.training.stopping import Stopped, StoppedCompiling, stoppable
from tests.signals import heed_interrupts
from tests.training.test_checkpoint import Silent, do, numbers

ROOT = Path(__file__).parents[2]
RunRanks = Callable[..., list[Any]]

SMALL = [
    *("--lighthouse-steps", "30", "--eval-every", "20"),
    *("--sample-bytes", "0", "--seqlen", "256", "--lighthouse.topk", "8"),
    *("--eval-sequences", "4", "--checkpoint-every", "4", "--optim.warmup-steps", "4"),
]
SHORT = [*SMALL, "--dense-steps", "30"]
ENDLESS = [*SMALL, "--dense-steps", "99970"]
"""For runs that a test ends, however late its signal comes."""


class Signals(Silent):
    """Sends this process a signal after a step, on one rank."""

    def __init__(self, number: int, after: int, rank: int) -> None:
        super().__init__()
        self.number, self.after, self.rank = number, after, rank

    def on_step(self, record: StepRecord, stages: Any) -> None:
        if record.step == self.after and dist.get_rank() == self.rank:
            os.kill(os.getpid(), self.number)


def stop_and_go_on(group: object, run: Run, number: int, rank: int) -> list[Any]:
    """Stop a run by a signal to one rank; return how it ended, and whether bits are the same."""
    weights, history = do(replace(run, out=f"{run.out}/whole"), Silent())
    stopped = replace(run, out=f"{run.out}/stopped", checkpoint_every=100)
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as error:
        do(stopped, Signals(number, 2, rank))
    watcher = Silent()
    again, more = do(stopped, watcher)
    return [
        error.value.code,
        str(error.value),
        watcher.started_at,
        signal.getsignal(number) == before,
        all(torch.equal(weights[name], again[name]) for name in weights),
        numbers(history) == numbers(more),
    ]


@pytest.mark.parametrize(
    ("number", "rank", "code"),
    [(signal.SIGTERM, 0, 143), (signal.SIGUSR1, 1, 138)],
    ids=["SIGTERM", "SIGUSR1"],
)
def test_a_signal_to_one_rank_saves_on_all(
    run_ranks: RunRanks, small_run: Run, tmp_path: Path, number: int, rank: int, code: int
) -> None:
    """Fails if a rank dies or trains on, steps are lost, or the bits differ when it goes on."""
    run = replace(small_run, cp=2, out=str(tmp_path / "out"))
    for answer in run_ranks(2, stop_and_go_on, run, number, rank):
        said = answer.pop(1)
        assert answer == [code, 3, True, True, True]
        assert f"stopped by {number.name} after step 3; " in said
        assert said.endswith(f"the same command goes on from there (exit status {code})")


def compile_until(own: int | None, child: int) -> None:
    """Wait for a process that ends by a signal, after another one came to this process."""
    if own is not None:
        os.kill(os.getpid(), own)
    script = f"import os; os.kill(os.getpid(), {child})" if child else "raise SystemExit(1)"
    try:
        subprocess.run([sys.executable, "-c", script], check=True)
    except subprocess.CalledProcessError as error:
        raise RuntimeError("of torch.compile") from error


def test_a_compiler_that_is_stopped_too_is_told_from_one_that_fails() -> None:
    """Fails if a job that is told to stop as it compiles seems to fail, or a failure to stop."""
    stopped, term, kill = r"stopped by SIGTERM in a step", signal.SIGTERM, signal.SIGKILL
    with pytest.raises(StoppedCompiling, match=stopped) as told, stoppable():
        compile_until(term, term)
    assert told.value.code == 143
    # Killed for memory; failed; ended by somebody who did not ask this run to stop.
    for own, child in ((term, kill), (term, 0), (None, term)):
        with pytest.raises(RuntimeError, match=r"of torch\.compile"), stoppable():
            compile_until(own, child)


def start(*arguments: str, ranks: int = 0, restarts: int = 0, **how: Any) -> subprocess.Popen[str]:
    """Start `lhcp train` in a session of its own."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    torchrun += ["--max-restarts", str(restarts), "--monitor-interval", "0.2"]
    command = [sys.executable, *(torchrun if ranks else []), "-m", "lhcp", "train", *arguments]
    # What a machine has beside its own packages stays in reach.
    path = os.pathsep.join((str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_interrupts,
        **how,
    )


def read_until(process: subprocess.Popen[str], text: str) -> None:
    """Read what a process prints until a line has `text`."""
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} was not printed: {process.communicate()}")


def test_an_interrupted_run_says_one_line(tmp_path: Path) -> None:
    """Fails if Ctrl-C prints a stack, or ends as a success."""
    process = start("tiny", "--out", str(tmp_path), *ENDLESS)
    read_until(process, "1/100000  loss")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.strip() == "interrupted: checkpoints are as they were"


def test_a_stopped_run_says_one_line_and_its_status(tmp_path: Path) -> None:
    """Fails if SIGTERM prints a stack or ends without a checkpoint, or as a success."""
    process = start("tiny", "--out", str(tmp_path), *ENDLESS)
    read_until(process, "1/100000  loss")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    (line,) = said.strip().splitlines()
    assert line.startswith("stopped by SIGTERM after step ") and "step-000000" in line


def test_a_reader_that_leaves_does_not_end_the_run(tmp_path: Path) -> None:
    """Fails if a closed pipe, as of `| head -1`, ends training or its report."""
    process = start("tiny", "--out", str(tmp_path), *SHORT)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(timeout=120) == 0, said
    assert "BrokenPipe" not in said
    assert len(json.loads((tmp_path / "report.json").read_text())["history"]["steps"]) == 60


def result_of(folder: Path) -> tuple[list[Any], dict[str, Tensor]]:
    """Return a run's losses, and all tensors of its last checkpoint."""
    last = max((folder / "two_stages").glob("step-*"))
    steps = Record.read(last).beside["history"]["steps"]
    dcp_to_torch_save(last, folder / "tensors.pt")
    tensors = flat(torch.load(folder / "tensors.pt"))
    # Each process starts its own at random, and no step draws from it.
    del tensors["rng"]
    return [(r["step"], r["loss"], r["grad_norm"]) for r in steps], tensors


def flat(state: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of nested dicts by their names."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        inner = isinstance(value, dict)
        found |= flat(value, f"{prefix}{name}/") if inner else {prefix + name: value}
    return found


def ranks_of(agent: int) -> list[int]:
    """Return the processes that an agent started, in the order of their ranks."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return [int(child) for child in children]


@pytest.mark.parametrize(
    ("ranks", "kills", "seed"),
    [
        pytest.param(2, 2, 0, marks=pytest.mark.slow),
        *(pytest.param(2, 2, seed, marks=pytest.mark.soak) for seed in (1, 2)),
        *(pytest.param(4, 3, seed, marks=pytest.mark.soak) for seed in range(5)),
    ],
)
def test_killed_ranks_are_started_again_and_end_with_the_same_bits(
    tmp_path: Path, ranks: int, kills: int, seed: int
) -> None:
    """Fails if a restart does not find its peers, or the run ends with other bits.

    A rank is killed at random moments, of which the later ones may be in a start or a save.
    """
    draw = random.Random(seed)
    whole = start("tiny", "--cp", "2", "--out", str(tmp_path / "whole"), *SHORT, ranks=ranks)
    assert whole.communicate(timeout=200) and whole.returncode == 0
    out = tmp_path / "killed"
    process = start("tiny", "--cp", "2", "--out", str(out), *SHORT, ranks=ranks, restarts=3)
    read_until(process, f"{draw.choice((10, 20, 40))}/60  loss")
    for pause in (draw.random() / 10, *(2 + 6 * draw.random() for _ in range(kills - 1))):
        sleep(pause)
        if victims := ranks_of(process.pid):
            os.kill(draw.choice(victims), signal.SIGKILL)
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, said + errors
    assert "going on after step" in said
    (losses, tensors), (expected, of_whole) = result_of(out), result_of(tmp_path / "whole")
    assert losses == expected
    assert tensors.keys() == of_whole.keys()
    assert [n for n in of_whole if not torch.equal(tensors[n], of_whole[n])] == []
