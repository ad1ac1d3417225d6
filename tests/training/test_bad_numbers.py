"""Numbers gone bad: the first of them is named, and a step that has them can be skipped."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lhcp.training.data import open_data
from lhcp.training.loop import BAD_STEPS, train
from lhcp.training.parallel import Trainee, build
from lhcp.training.run import Run
from lhcp.training.step import train_step
from tests.training.test_checkpoint import Silent

RunRanks = Callable[..., list[Any]]


def spoil(trainee: Trainee, where: str) -> None:
    """Let one number of a forward, of a gradient or of a weight be no number."""
    block = trainee.model.blocks[1]

    def output(module: nn.Module, given: Any, returned: Tensor) -> Tensor:
        mask = torch.zeros_like(returned)
        mask[0, 0, 0] = torch.nan
        return returned + mask

    def gradient(module: nn.Module, given: Any, returned: Tensor) -> None:
        returned.register_hook(lambda grad: grad * torch.nan)

    if where == "weight":
        with torch.no_grad():
            block.mlp.down.weight.to_local()[-1] = torch.nan  # type: ignore[operator]
    else:
        block.mlp.register_forward_hook(output if where == "output" else gradient)


def spoilt_step(group: object, run: Run, where: str) -> str:
    """Take a step in which rank 1 has a bad number; return what is said."""
    trainee = build(run, torch.device("cpu"))
    data = open_data(run.data, run.seqlen, run.seed)
    if dist.get_rank() == 1:
        spoil(trainee, where)
    with pytest.raises(FloatingPointError) as error:
        train_step(run, trainee, data.train, run.stages, 1)
    return str(error.value)


@pytest.mark.parametrize(
    "recompute",
    [pytest.param(False, id="kept"), pytest.param(True, id="recomputed", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(
    ("where", "first"),
    [
        ("output", "the first was what blocks.1.mlp returns, on rank 1, then on ranks [0]"),
        ("gradient", "the first was the gradient of what blocks.1.mlp"),
        ("weight", "the first was the weight blocks.1.mlp.down.weight, on rank 1, then on"),
    ],
)
def test_the_first_bad_tensor_is_named(
    run_ranks: RunRanks, small_run: Run, tmp_path: Path, where: str, first: str, recompute: bool
) -> None:
    """Fails if ranks name what came of it, another rank, or different things."""
    run = replace(small_run, cp=2, recompute=recompute, out=str(tmp_path))
    said, other = run_ranks(2, spoilt_step, run, where)
    assert said == other and first in said
    assert "step 2 (lighthouse): loss" in said and "a lower --optim.lr" in said


class Spoiling(Silent):
    """Spoils the outputs of some steps."""

    def __init__(self, trainee: Trainee, bad: set[int]) -> None:
        super().__init__()
        self.bad, self.done = bad, 0
        self.skipped: list[int] = []
        trainee.model.blocks[0].register_forward_pre_hook(self.before)

    def before(self, module: nn.Module, given: Any) -> Any:
        if self.done + 1 in self.bad and torch.is_grad_enabled():
            return (given[0] * torch.nan, *given[1:])
        return given

    def on_step(self, record: Any, stages: Any) -> None:
        self.done = record.step
        if record.skipped:
            self.skipped.append(record.step)


@pytest.mark.usefixtures("one_rank")
def test_a_bad_step_is_skipped_and_the_run_goes_on(small_run: Run, tmp_path: Path) -> None:
    """Fails if weights take a step that is not finite, or a run ends for one that it may skip."""
    run = replace(small_run, on_bad_step="skip", out=str(tmp_path / "out"))
    trainee = build(run, torch.device("cpu"))
    watcher = Spoiling(trainee, {2})
    data = open_data(run.data, run.seqlen, run.seed)
    history = train(run, trainee, data, run.stages, run.folder, watcher)
    assert watcher.skipped == [2] and len(history.steps) == 5
    assert all(bool(p.isfinite().all()) for p in trainee.model.parameters())


@pytest.mark.usefixtures("one_rank")
def test_bad_steps_without_end_end_the_run(small_run: Run, tmp_path: Path) -> None:
    """Fails if a run skips for ever, or its end does not say what was bad and what is left."""
    run = replace(small_run, on_bad_step="skip", checkpoint_every=1, out=str(tmp_path / "out"))
    trainee = build(run, torch.device("cpu"))
    watcher = Spoiling(trainee, set(range(2, 100)))
    data = open_data(run.data, run.seqlen, run.seed)
    with pytest.raises(FloatingPointError) as error:
        train(run, trainee, data, run.stages, run.folder, watcher)
    assert watcher.skipped == [2, 3, 4][:BAD_STEPS]
    assert "step 5 " in str(error.value) and "what blocks.0" in str(error.value)
    assert "step-00000004 stays the newest" in str(error.value)


@pytest.mark.usefixtures("one_rank")
def test_a_first_step_blames_no_rate(small_run: Run, tmp_path: Path) -> None:
    """Fails if a rate is blamed that no step was taken with."""
    trainee = build(small_run, torch.device("cpu"))
    spoil(trainee, "output")
    data = open_data(small_run.data, small_run.seqlen, small_run.seed)
    with pytest.raises(FloatingPointError, match=r"blocks\.1\.mlp returns, on rank 0") as error:
        train_step(small_run, trainee, data.train, small_run.stages, 0)
    assert "optim.lr" not in str(error.value)
