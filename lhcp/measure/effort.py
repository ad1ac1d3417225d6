"""How long a measurement takes: what a budget of seconds is spent on, and telling of it."""

import sys
import time
from dataclasses import dataclass

from lhcp.measure.timings import PHASES

LEAST, MOST = 3, 20
"""Repeats that say something, and more than which say little more."""
ALL_PHASES = 2
"""Forward, backward and both take twice as long as both alone."""


@dataclass(frozen=True)
class Effort:
    """What a measurement may take."""

    budget: float
    """Seconds, where `repeats` is not given."""
    repeats: int | None = None
    warmup: int = 1
    """Unmeasured repeats before."""
    calls: int | None = None
    single_seconds: float | None = None
    """The longest that T1 may take; None: a part of the budget."""

    def __post_init__(self) -> None:
        too_few = self.repeats is not None and self.repeats < 1
        if too_few or self.warmup < 0 or (self.calls is not None and self.calls < 1):
            raise ValueError(
                f"repeats={self.repeats}, warmup={self.warmup}, calls={self.calls}: measure at "
                "least once"
            )
        if not 0 < self.budget < float("inf"):
            raise ValueError(f"budget={self.budget}: must be a positive number of seconds, as 30")

    @property
    def single_limit(self) -> float:
        """Seconds that T1 may take, forward and backward."""
        if self.single_seconds is not None:
            return self.single_seconds
        # It runs in every repeat, once for each phase, and is looked for before.
        return 10.0 if self.repeats is not None else self.budget / 15


@dataclass(frozen=True)
class Rounds:
    """What is measured, after a first round of forward and backward in one go."""

    repeats: int
    phases: tuple[str, ...]
    keep_first: bool
    """Whether the first round counts, because there is no time for one that does not."""
    seconds: float
    """What they will take, about."""
    over: float = 0.0
    """Seconds beyond the budget, about."""

    def __str__(self) -> str:
        """Return what is to come, in words."""
        what = "each direction and both" if len(self.phases) > 1 else "both directions in one go"
        over = f", {self.over:.0f} s beyond the budget" if self.over else ""
        return f"{self.repeats} rounds of {what}, about {self.seconds:.0f} s{over}"


def rounds(effort: Effort, spent: float, first: float) -> Rounds:
    """Return what the rest of the budget is spent on.

    Args:
        spent: seconds that are gone, the first round's too.
        first: seconds of that round, the slowest rank's.
    """
    if effort.repeats is not None:
        count = effort.warmup + effort.repeats
        return Rounds(effort.repeats, PHASES, False, count * ALL_PHASES * first)
    left = effort.budget - spent
    if left >= LEAST * ALL_PHASES * first:
        repeats = min(MOST, int(left / (ALL_PHASES * first)))
        return Rounds(repeats, PHASES, False, repeats * ALL_PHASES * first)
    if left >= LEAST * first:
        repeats = min(MOST, int(left / first))
        return Rounds(repeats, ("both",), False, repeats * first)
    # Fewer would say nothing: these are over the budget, and it is said.
    seconds = (LEAST - 1) * first
    return Rounds(LEAST, ("both",), True, seconds, max(spent + seconds - effort.budget, 0.0))


def too_long(effort: Effort, spent: float, call: float, runs: int) -> str:
    """Return what to say where even the fewest rounds will not fit the budget, else nothing.

    Args:
        spent: seconds that are gone.
        call: seconds of one forward and backward.
        runs: how many of about that length are in a round.
    """
    needed = spent + LEAST * runs * call
    if effort.repeats is not None or needed <= effort.budget:
        return ""
    return (
        f"one forward and backward takes {call:.1f} s, so that {LEAST} rounds will take about "
        f"{needed:.0f} s, more than the budget of {effort.budget:g} s: a shorter sequence or fewer "
        "heads take less"
    )


class Progress:
    """Says on one rank what is done and what is to come, on stderr, some seconds apart."""

    def __init__(self, shown: bool, every: float = 5.0) -> None:
        self.begin = self._said = time.perf_counter()
        self._shown, self._every = shown, every

    @property
    def spent(self) -> float:
        """Seconds since the measurement began."""
        return time.perf_counter() - self.begin

    def say(self, text: str) -> None:
        """Print a line."""
        self._said = time.perf_counter()
        if self._shown:
            print(f"measuring: {text}", file=sys.stderr, flush=True)

    def at(self, text: str) -> None:
        """Print a line if the last one was some time ago."""
        if time.perf_counter() - self._said > self._every:
            self.say(text)
