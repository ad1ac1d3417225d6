"""The step is the same on every mesh: SGD shows a wrong scale of the gradient, AdamW would not."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lhcp.training.data import Sequences, open_corpus
from lhcp.training.loop import evaluate, train_step
from lhcp.training.model import Mode, set_mode
from lhcp.training.parallel import build
from lhcp.training.run import Run
from lhcp.training.stages import OptimConfig, Stage
from tests.training.spawned import run_ranks

NUM_STEPS = 3


def steps_of(run: Run, mode: Mode) -> dict[str, list[float]]:
    """Return loss and gradient norm of each step, and the held-out loss after them."""
    text, rest = open_corpus(run.data)
    data, heldout = (Sequences(part, run.seqlen, run.seed) for part in (text, rest))
    trainee = build(run, torch.device("cpu"))
    set_mode(trainee.model, mode)
    stages = (Stage(name="only", mode=mode, steps=NUM_STEPS),)
    records = [train_step(run, trainee, data, stages, step) for step in range(NUM_STEPS)]
    return {
        "loss": [r.loss for r in records],
        "grad_norm": [r.grad_norm for r in records],
        "heldout": [evaluate(run, trainee, heldout, mode)],
    }


def both_modes(run: Run) -> dict[str, dict[str, list[float]]]:
    """Return `steps_of` in each mode."""
    return {mode: steps_of(run, mode) for mode in ("lighthouse", "dense")}


@pytest.fixture
def sgd_run(small_run: Run) -> Run:
    # No clipping: it would hide a wrong scale as AdamW does.
    sgd = OptimConfig(kind="sgd", lr=0.5, warmup_steps=0, clip=float("inf"))
    return replace(small_run, optim=sgd)


@pytest.fixture
def on_one_rank(one_rank: None, sgd_run: Run) -> dict[str, dict[str, list[float]]]:
    return both_modes(sgd_run)


@pytest.mark.parametrize(
    ("dp", "cp", "accumulate"),
    [(1, 2, 1), (2, 1, 1), (2, 2, 1), (1, 2, 2)],
    ids=["dp1cp2", "dp2cp1", "dp2cp2", "dp1cp2_accumulating"],
)
def test_step_does_not_depend_on_the_mesh(
    dp: int,
    cp: int,
    accumulate: int,
    sgd_run: Run,
    on_one_rank: dict[str, dict[str, list[float]]],
    tmp_path: Path,
) -> None:
    meshed = replace(sgd_run, cp=cp, accumulate=accumulate)
    for result in run_ranks(tmp_path, dp * cp, both_modes, meshed):
        for mode, expected in on_one_rank.items():
            for name, values in expected.items():
                assert result[mode][name] == pytest.approx(values, rel=3e-6), (mode, name)
