"""Several things timed in turn, so that all see the same clocks: medians with their spread."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from lhcp.measure.clock import Run, elapsed
from lhcp.measure.timings import Timing

# A run this long is warm after one, and too long to throw a second away.
LONG_MS = 500.0


@dataclass(frozen=True)
class Spread(Timing):
    """Median and quartiles of one arm, ms."""

    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        found = Timing.of(samples)
        return cls(found.median, found.low, found.high, len(samples))

    @property
    def percent(self) -> float:
        """Return half the distance of the quartiles, in percent of the median."""
        return 50 * (self.high - self.low) / self.median

    def __str__(self) -> str:
        return f"{self.median:.{3 if self.median < 100 else 1}f} ±{self.percent:.1f}%"


@dataclass(frozen=True)
class Arm:
    """One thing to time: called back to back until `target_ms` have passed, in up to `rounds`."""

    run: Run
    rounds: int = 11
    target_ms: float = 40.0
    most_calls: int = 16
    """In a row, however short they are."""


def interleaved(arms: dict[str, Arm], device: torch.device | None = None) -> dict[str, Spread]:
    """Time the arms in turn, there and back again, so that all of them see the same clocks.

    A sample is the time of a few calls in a row on a GPU that was idle before: what one call costs
    in a run of many, host included where the host is the slower one.

    Args:
        device: the current GPU if None.
    """
    device = torch.device("cuda") if device is None else device
    inner, samples = {}, {}
    for name, arm in arms.items():
        arm.run()
        once = 1e3 * elapsed(arm.run, device)
        inner[name] = max(1, min(arm.most_calls, int(arm.target_ms / once)))
        samples[name] = [once] if once > LONG_MS else []
    for i in range(max(arm.rounds for arm in arms.values())):
        for name, arm in list(arms.items())[:: -1 if i % 2 else 1]:
            if len(samples[name]) < arm.rounds:
                samples[name].append(1e3 * elapsed(arm.run, device, inner[name]))
    return {name: Spread.of(found) for name, found in samples.items()}


def captured(run: Run) -> Run:
    """Capture a call in a CUDA graph; the result replays it, and keeps what the call reads."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run(), run

    def replay() -> Any:
        graph.replay()
        return kept[0]

    return replay


def rotating(run: Callable[..., Any], inputs: list[tuple[Tensor, ...]]) -> Run:
    """Call `run` with one of the input sets after the other."""
    turns = cycle(inputs)
    return lambda: run(*next(turns))
