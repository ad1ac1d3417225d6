"""Times of a rotation and of its twins: what was measured, and what follows from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

PHASES = ("forward", "backward", "both")
DERIVED = ("overhead", "exposed", "overlap", "contention", "host_sets_the_pace")
"""Properties of a phase that go into the JSON beside its fields."""


@dataclass(frozen=True)
class Timing:
    """Seconds over the repeats; each repeat counts its slowest rank."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """Summarise at least one repeat."""
        ordered = sorted(seconds)

        def quantile(share: float) -> float:
            at = share * (len(ordered) - 1)
            below = int(at)
            above = min(below + 1, len(ordered) - 1)
            return ordered[below] + (at - below) * (ordered[above] - ordered[below])

        return cls(quantile(0.5), quantile(0.25), quantile(0.75))


def half_width(samples: Sequence[float]) -> float | None:
    """Return half the width of a 95% interval of the median, or None of fewer than three samples.

    The notch of a box plot (McGill, Tukey and Larsen, 1978), which is for more than a few; below
    six samples the interval is their range, in which the median of all is in 75% (three) to 94%.
    """
    if len(samples) < 3:
        return None
    timing = Timing.of(samples)
    if len(samples) < 6:
        return max(max(samples) - timing.median, timing.median - min(samples))
    return 1.57 * (timing.high - timing.low) / sqrt(len(samples))


def is_noise(value: float, error: float | None) -> bool:
    """Return whether a number cannot be told from 0; of an unknown error, False."""
    return error is not None and abs(value) <= error


@dataclass(frozen=True)
class PhaseReport:
    """One direction, or both in one go: the real thing beside its twins."""

    phase: str
    """"forward", "backward" or "both"."""
    real: Timing
    """T: the rotation as it is."""
    compute: Timing
    """C: the same code, sending nothing."""
    communication: Timing
    """M: the same messages, without attention."""
    single: Timing | None
    """T1: one device on the whole; scaled up if the report says so; None: it does not fit."""
    waited: float | None
    """Seconds in which T's slowest rank stood still for messages; None where it is not timed."""
    bytes_per_rank: int | None
    """What one rank sends; None where the cost model does not know the rotation."""
    world_size: int
    host: float | None = None
    """Seconds that T's slowest host takes to launch a call; None where it computes itself."""
    exposed_error: float | None = None
    """Half the width of a 95% interval of T - C, from pairs of runs; None: too few repeats."""
    overhead_error: float | None = None
    """The same of the overhead."""

    @property
    def host_sets_the_pace(self) -> bool:
        """Whether T is what the host takes: then neither messages nor compute are what costs."""
        return self.host is not None and self.real.median < 1.15 * self.host

    @property
    def overhead(self) -> float | None:
        """W T / T1 - 1: what the rotation costs over a device that needs none."""
        if self.single is None:
            return None
        return self.world_size * self.real.median / self.single.median - 1

    @property
    def exposed(self) -> float:
        """T - C, seconds: communication that did not hide behind compute."""
        return self.real.median - self.compute.median

    @property
    def overlap(self) -> float | None:
        """1 - (T - C) / M: the share of the communication that hid; None without any."""
        if self.communication.median == 0:
            return None
        return 1 - self.exposed / self.communication.median

    @property
    def contention(self) -> float | None:
        """T - C - waited, seconds: compute that ran slower because messages were under way."""
        return None if self.waited is None else self.exposed - self.waited

    @property
    def gigabytes_per_second(self) -> float | None:
        """Rate of M: what one rank sends over the time that sending takes."""
        if not self.bytes_per_rank or self.communication.median == 0:
            return None
        return self.bytes_per_rank / self.communication.median / 1e9


@dataclass(frozen=True)
class StepReport:
    """One step of one stage in one of the three runs."""

    variant: str
    """"real", "compute" or "communication", or "layer", the real thing with all its stages."""
    phase: str
    stage: str
    kind: str
    """"compute" or "wait"."""
    step: int
    timing: Timing


@dataclass(frozen=True)
class Mark:
    """When one step ran on one rank, in seconds since that rank left the barrier."""

    rank: int
    variant: str
    stage: str
    kind: str
    step: int
    start: float
    stop: float
