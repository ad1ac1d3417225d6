"""The step is the same on every mesh: SGD shows a wrong scale of the gradient, AdamW would not."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lhcp.layer.mode import set_mode
from lhcp.layer.module import Mode
from lhcp.ring.heads import TWO_AXES
from lhcp.training.data import open_data
from lhcp.training.parallel import build
from lhcp.training.run import Run
from lhcp.training.stages import OptimConfig, Stage
from lhcp.training.step import evaluate, train_step


def steps_of(run: Run, mode: Mode, num_steps: int) -> dict[str, list[float]]:
    """Return loss and gradient norm of each step, and the dense held-out loss after them."""
    data = open_data(run.data, run.seqlen, run.seed)
    trainee = build(run, torch.device("cpu"))
    set_mode(trainee.model, mode)
    stages = (Stage(name="only", mode=mode, steps=num_steps),)
    records = [train_step(run, trainee, data.train, stages, step) for step in range(num_steps)]
    return {
        "loss": [r.loss for r in records],
        "grad_norm": [r.grad_norm for r in records],
        "heldout": [evaluate(run, trainee, data.heldout, "dense")],
    }


def both_modes(group: object, run: Run) -> dict[str, dict[str, list[float]]]:
    """Return `steps_of` in each mode."""
    # Sums over ranks round differently, so after a step two meshes may take another of two entries
    # with nearly equal scores. Hence one lighthouse step, and the weights after it seen densely.
    return {"lighthouse": steps_of(run, "lighthouse", 1), "dense": steps_of(run, "dense", 3)}


@pytest.fixture
def sgd_run(small_run: Run) -> Run:
    # No clipping: it would hide a wrong scale as AdamW does.
    sgd = OptimConfig(kind="sgd", lr=0.5, warmup_steps=0, clip=float("inf"))
    return replace(small_run, optim=sgd)


@pytest.fixture
def on_one_rank(one_rank: None, sgd_run: Run) -> dict[str, dict[str, list[float]]]:
    return both_modes(None, sgd_run)


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
    run_ranks: Callable[..., list[Any]],
) -> None:
    meshed = replace(sgd_run, cp=cp, accumulate=accumulate)
    equal(on_one_rank, run_ranks(dp * cp, both_modes, meshed))


@pytest.mark.parametrize(
    "rotation",
    [pytest.param(name, marks=() if name == "hybrid" else pytest.mark.slow) for name in TWO_AXES],
)
def test_step_does_not_depend_on_nodes(
    rotation: str,
    sgd_run: Run,
    on_one_rank: dict[str, dict[str, list[float]]],
    run_ranks: Callable[..., list[Any]],
) -> None:
    """Fails if the ranks of a sequence over two nodes do something else than one rank does."""
    over_nodes = replace(sgd_run, cp=4, nodes=2, rotation=rotation)
    equal(on_one_rank, run_ranks(4, both_modes, over_nodes))


def equal(expected: dict[str, Any], results: list[Any]) -> None:
    """Check that each rank's losses and norms are those expected."""
    for result in results:
        for mode, of_mode in expected.items():
            for name, values in of_mode.items():
                assert result[mode][name] == pytest.approx(values, rel=3e-6), (mode, name)
