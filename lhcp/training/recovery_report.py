"""What the results of a recovery say: curves, the switch, and splits against dense, in numbers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean, median, stdev

import numpy as np

from lhcp.layer.module import Mode
from lhcp.training.history import History
from lhcp.training.recovery import DENSE, LIGHTHOUSE
from lhcp.training.recovery_results import ArmResult
from lhcp.training.switch import Switch, find_switch

SLOW = 3.0
"""A step that took this many medians of its stage was compiling, or waiting: it counts as one."""


@dataclass(frozen=True)
class Curve:
    """Held-out losses of one arm of one seed, all in one mode."""

    steps: tuple[float, ...]
    """Steps done, ascending."""
    seconds: tuple[float, ...]
    """Training seconds until then."""
    losses: tuple[float, ...]
    """Nats per byte."""

    def at_step(self, step: float) -> float | None:
        """Return the loss after `step` steps, between evaluations in line; None beyond them."""
        return _between(step, self.steps, self.losses)

    def at_second(self, second: float) -> float | None:
        """Return the loss after `second` training seconds; None before the first and the last."""
        return _between(second, self.seconds, self.losses)

    def second_reaching(self, loss: float) -> float | None:
        """Return the first second at which the loss was as low as `loss`, or None."""
        for index, now in enumerate(self.losses):
            if now <= loss:
                if index == 0:
                    return self.seconds[0]
                before = self.losses[index - 1]
                share = (before - loss) / (before - now)
                return self.seconds[index - 1] + share * (
                    self.seconds[index] - self.seconds[index - 1]
                )
        return None


def _between(x: float, xs: Sequence[float], ys: Sequence[float]) -> float | None:
    if not xs or not xs[0] <= x <= xs[-1]:
        return None
    return float(np.interp(x, xs, ys))


def training_seconds(result: ArmResult) -> list[float]:
    """Return the seconds of training until the end of each step.

    They are sums of steps; evaluations and checkpoints do not count. A step `SLOW` times its
    stage's median counts as the median, so that compiling, which a longer run has once too, and
    being cut and taken up again, do not.
    """
    counted: list[float] = []
    for _, count in result.stages:
        seconds = result.columns["seconds"][len(counted) : len(counted) + count]
        usual = median(seconds)
        counted += [usual if s > SLOW * usual else s for s in seconds]
    return list(accumulate(counted))


def curve(result: ArmResult, mode: Mode) -> Curve:
    """Return the evaluations of a result in one mode."""
    clock = training_seconds(result)
    held = [r for r in result.evals if r.mode == mode]
    return Curve(
        tuple(float(r.step) for r in held),
        tuple(clock[r.step - 1] for r in held),
        tuple(r.loss for r in held),
    )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A split of one seed against dense from scratch of the same seed."""

    split: str
    seed: int
    switch: Switch
    steps: int
    """Of both stages."""
    seconds: float
    """Training seconds of both stages."""
    whole_seconds: float
    """The same with slow steps as they were."""
    dense_seconds: float
    dense_final: float
    """After all of dense's own steps."""
    dense_at_tokens: float
    """Dense after as many steps as the split."""
    dense_at_time: float | None
    """Dense after as many seconds as the split; None where it ended before."""
    reached: float | None
    """Seconds until the split is as low as `dense_final`, or None."""
    dense_reached: float
    """Seconds until dense is."""

    @property
    def equal_tokens(self) -> float:
        """Return final loss less dense's at equal tokens; below 0 the split is better."""
        return self.switch.final - self.dense_at_tokens

    @property
    def equal_time(self) -> float | None:
        """Return final loss less dense's at equal time, or None where dense ended before."""
        return None if self.dense_at_time is None else self.switch.final - self.dense_at_time

    @property
    def time_share(self) -> float | None:
        """Return the time to reach dense's final loss over dense's own, or None."""
        return None if self.reached is None else self.reached / self.dense_reached


def compare(results: Iterable[ArmResult]) -> list[Comparison]:
    """Return each split against dense, of the seeds that have both."""
    by_seed: dict[int, dict[str, ArmResult]] = {}
    for result in results:
        by_seed.setdefault(result.seed, {})[result.arm] = result
    found = []
    for seed, arms in by_seed.items():
        if DENSE not in arms:
            continue
        dense = curve(arms[DENSE], "dense")
        for name, result in arms.items():
            switch = find_switch(History(evals=result.evals))
            if name in (DENSE, LIGHTHOUSE) or switch is None:
                continue
            own, clock = curve(result, "dense"), training_seconds(result)
            at_tokens = dense.at_step(len(clock))
            dense_reached = dense.second_reaching(dense.losses[-1])
            if at_tokens is None:
                raise ValueError(
                    f"seed {seed}: dense has {dense.steps[-1]:.0f} steps, {name} has {len(clock)}: "
                    "take dense up again with all --splits"
                )
            assert dense_reached is not None
            found.append(
                Comparison(
                    split=name,
                    seed=seed,
                    switch=switch,
                    steps=len(clock),
                    seconds=clock[-1],
                    whole_seconds=sum(result.columns["seconds"]),
                    dense_seconds=dense.seconds[-1],
                    dense_final=dense.losses[-1],
                    dense_at_tokens=at_tokens,
                    dense_at_time=dense.at_second(clock[-1]),
                    reached=own.second_reaching(dense.losses[-1]),
                    dense_reached=dense_reached,
                )
            )
    return found


@dataclass(frozen=True)
class Spread:
    """A number over seeds."""

    mean: float
    low: float
    high: float
    std: float | None
    """Of the sample; None of one."""
    count: int


def spread(values: Sequence[float]) -> Spread | None:
    """Return mean, smallest, largest and standard deviation over seeds; None of nothing."""
    if not values:
        return None
    std = stdev(values) if len(values) > 1 else None
    return Spread(fmean(values), min(values), max(values), std, len(values))


@dataclass(frozen=True)
class Band:
    """Curves of several seeds as one: at each step that all have, over the seeds."""

    steps: tuple[float, ...]
    seconds: tuple[float, ...]
    """Mean over the seeds."""
    mean: tuple[float, ...]
    low: tuple[float, ...]
    """The lowest seed."""
    high: tuple[float, ...]
    """The highest seed."""


def band(curves: Sequence[Curve]) -> Band:
    """Return the band of curves, at the steps that they have in common."""
    steps = sorted(set.intersection(*(set(c.steps) for c in curves)))
    rows = [[c.losses[c.steps.index(step)] for c in curves] for step in steps]
    times = [[c.seconds[c.steps.index(step)] for c in curves] for step in steps]
    return Band(
        tuple(steps),
        tuple(map(fmean, times)),
        tuple(map(fmean, rows)),
        tuple(map(min, rows)),
        tuple(map(max, rows)),
    )


def by_arm(results: Iterable[ArmResult]) -> dict[str, list[ArmResult]]:
    """Return the results of each arm; dense first, then the lighthouse stage."""
    order = (DENSE, LIGHTHOUSE)
    arms: dict[str, list[ArmResult]] = {}
    for result in sorted(results, key=lambda r: r.arm not in order):
        arms.setdefault(result.arm, []).append(result)
    return arms


def switch_step(result: ArmResult) -> int:
    """Return the steps done at a split's switch; 0 where there is none."""
    return result.stages[0][1] if len(result.stages) > 1 else 0


def since(whole: Band, step: int) -> Band:
    """Return a band from `step` on."""
    kept = [i for i, at in enumerate(whole.steps) if at >= step]
    fields = (whole.steps, whole.seconds, whole.mean, whole.low, whole.high)
    return Band(*(tuple(values[i] for i in kept) for values in fields))


def bands(results: Iterable[ArmResult]) -> dict[str, dict[Mode, Band]]:
    """Return arm -> mode -> its evaluations over seeds.

    A split's are the dense ones from its switch on: what comes before is the lighthouse stage's,
    whose evaluations are in both modes.
    """
    found: dict[str, dict[Mode, Band]] = {}
    for arm, same in by_arm(results).items():
        modes: tuple[Mode, ...] = ("lighthouse", "dense") if arm == LIGHTHOUSE else ("dense",)
        found[arm] = {
            mode: since(band([curve(r, mode) for r in same]), switch_step(same[0]))
            for mode in modes
        }
    return found
