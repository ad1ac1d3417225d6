"""Spikes: what is one, that its step may be skipped, and that a run goes on with the same limit."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lhcp.training import spikes
from lhcp.training.data import open_data
from lhcp.training.history import StepRecord
from lhcp.training.loop import train
from lhcp.training.parallel import Trainee, build
from lhcp.training.run import Run
from lhcp.training.run_checks import check_run
from lhcp.training.spikes import LEAST, WINDOW, spike_limit
from tests.training.test_checkpoint import Silent


def records(*norms: float, stage: str = "dense") -> list[StepRecord]:
    """Return records of steps with these gradient norms."""
    return [StepRecord(i, stage, 3.0, norm, 1e-3, 0.5, 1.0, None) for i, norm in enumerate(norms)]


@pytest.mark.parametrize(
    ("done", "limit"),
    [
        pytest.param(records(*[2.0] * LEAST), 20.0, id="enough"),
        pytest.param(records(*[2.0] * (LEAST - 1)), math.inf, id="too_few"),
        pytest.param(records(*[2.0] * LEAST, stage="lighthouse"), math.inf, id="another_stage"),
        pytest.param(records(*[2.0] * (LEAST - 1), math.nan), math.inf, id="too_few_finite"),
        pytest.param(records(*[2.0] * LEAST, math.nan, math.inf), 20.0, id="finite_ones"),
        pytest.param(records(*[9.0] * WINDOW, *[2.0] * WINDOW), 20.0, id="the_last_ones"),
        pytest.param(records(*[2.0] * LEAST, *[1e6] * 5), 20.0, id="median"),
    ],
)
def test_the_limit_is_a_multiple_of_the_median_of_the_stages_last_norms(
    done: list[StepRecord], limit: float
) -> None:
    """Fails if another stage, numbers that are not finite, or a spike itself move the limit."""
    assert spike_limit(10.0, done, "dense") == limit
    assert spike_limit(0.0, done, "dense") == math.inf


@pytest.mark.parametrize("factor", [0.5, 1.0, -3.0, math.inf, math.nan])
def test_a_factor_that_is_none_is_refused(small_run: Run, factor: float) -> None:
    """Fails if a run starts whose every step, or none, is a spike."""
    with pytest.raises(ValueError, match=r"spike_factor=.*more than 1, as 10, or 0 for none"):
        check_run(replace(small_run, spike_factor=factor), 1)


class Steepening(Silent):
    """Makes the gradients of some steps a thousand times as long."""

    def __init__(self, trainee: Trainee, steep: set[int], stop_after: int | None = None) -> None:
        super().__init__(stop_after)
        self.steep, self.done = steep, 0
        self.skipped: list[int] = []
        trainee.model.blocks[-1].register_forward_hook(self.steepen)

    def steepen(self, module: nn.Module, given: Any, returned: Tensor) -> None:
        if self.done + 1 in self.steep and returned.requires_grad:
            returned.register_hook(lambda grad: grad * 1000)

    def on_start(self, done: int, folder: Path) -> None:
        super().on_start(done, folder)
        self.done = done

    def on_step(self, record: StepRecord, stages: Any) -> None:
        self.done = record.step
        if record.skipped:
            self.skipped.append(record.step)
        super().on_step(record, stages)


AT = 8


@pytest.fixture
def long_run(small_run: Run, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Run:
    """A run of one stage in which few steps are usual, with a checkpoint right before a spike."""
    monkeypatch.setattr(spikes, "LEAST", 5)
    return replace(
        small_run,
        lighthouse_steps=0,
        dense_steps=AT + 4,
        seqlen=128,
        lighthouse=replace(small_run.lighthouse, topk=16, num_strata=4),
        eval_every=1000,
        checkpoint_every=AT - 1,
        on_bad_step="skip",
        spike_factor=10.0,
    )


def trained(run: Run, folder: Path, steep: set[int], stop_after: int | None = None) -> Any:
    """Train the run, with steep steps; return its watcher, its history and its weights."""
    run = replace(run, out=str(folder))
    trainee = build(run, torch.device("cpu"))
    watcher = Steepening(trainee, steep, stop_after)
    data = open_data(run.data, run.seqlen, run.seed)
    history = train(run, trainee, data, run.stages, run.folder, watcher)
    return watcher, history, [p.detach().clone() for p in trainee.model.parameters()]


@pytest.mark.usefixtures("one_rank")
def test_a_spike_is_skipped_and_a_run_that_goes_on_skips_the_same(
    long_run: Run, tmp_path: Path
) -> None:
    """Fails if a spike moves the weights, or what is usual is forgotten by a checkpoint."""
    watcher, history, weights = trained(long_run, tmp_path / "whole", {2, AT})
    # The second step is as steep, and comes before anything is usual.
    assert watcher.skipped == [AT] and history.steps[1].grad_norm > 100
    with pytest.raises(InterruptedError):
        trained(long_run, tmp_path / "cut", {2, AT}, stop_after=AT)
    again, resumed, same = trained(long_run, tmp_path / "cut", {2, AT})
    assert again.started_at == AT - 1 and again.skipped == [AT]
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))
    assert [one.grad_norm for one in resumed.steps] == [one.grad_norm for one in history.steps]


@pytest.mark.usefixtures("one_rank")
def test_without_a_factor_the_same_step_is_taken(long_run: Run, tmp_path: Path) -> None:
    """Fails if steps are skipped that nobody asked to be."""
    watcher, _, _ = trained(replace(long_run, spike_factor=0.0), tmp_path / "out", {AT})
    assert watcher.skipped == []


@pytest.mark.usefixtures("one_rank")
def test_a_spike_ends_a_run_that_stops_in_words(long_run: Run, tmp_path: Path) -> None:
    """Fails if the end does not say how long the gradient was, what is usual, and what to do."""
    run = replace(long_run, on_bad_step="stop")
    with pytest.raises(FloatingPointError, match=rf"step {AT} \(dense\): loss .*: a spike, ") as e:
        trained(run, tmp_path / "out", {AT})
    assert "10 times the median" in str(e.value) and "--on-bad-step skip" in str(e.value)
    assert f"step-{AT - 1:08d} stays the newest" in str(e.value)


@pytest.mark.usefixtures("one_rank")
def test_spikes_without_end_end_the_run(long_run: Run, tmp_path: Path) -> None:
    """Fails if a run whose gradients have grown for good skips on and on."""
    with pytest.raises(FloatingPointError, match=rf"step {AT + 3} .*: a spike"):
        trained(long_run, tmp_path / "out", set(range(AT, 1000)))
