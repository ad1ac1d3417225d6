"""Named, timed spans: every stage and ring step in a profile, and how long the rotation waited."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import record_function


class Spans:
    """Names each stage and step for torch.profiler, and measures nothing."""

    @contextmanager
    def span(self, stage: str, kind: str, step: int, device: torch.device) -> Iterator[None]:
        """Open a range called "lhcp::<stage>::<kind>[<step>]".

        Args:
            stage: which part of the layer, for example "ring_forward".
            kind: "compute" for work, "wait" for time that the device stands still for messages.
            step: index inside the stage.
            device: where the work runs.
        """
        # A range costs as much as a small launch; Dynamo would ignore it.
        if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():
            yield
            return
        with record_function(f"lhcp::{stage}::{kind}[{step}]"):
            yield

    def __deepcopy__(self, memo: object) -> "Spans":
        """Return these spans: one object serves all layers, copies of layers too."""
        return self

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Pickle as what a new process has: nothing measured yet."""
        return "UNTIMED" if self is UNTIMED else (type(self), ())


UNTIMED = Spans()


def goes_through_operators(spans: Spans) -> bool:
    """Return whether a stage runs as an opaque operator, not as the function inside of it.

    Compilers, graphs and checkpoint policies see operators; spans that measure cannot be handed
    into one.
    """
    return spans is UNTIMED or torch.compiler.is_compiling()


@dataclass(frozen=True)
class Span:
    """One measured range, in seconds since its `Timers` were reset."""

    stage: str
    kind: str
    step: int
    start: float
    stop: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.stop - self.start


def uncovered(waits: Iterable[tuple[float, float]], work: Iterable[tuple[float, float]]) -> float:
    """Return how long some interval of `waits` runs and none of `work` does.

    On a GPU a message is waited for in one stream while other streams compute: only what no work
    covers is lost.
    """
    edges = [
        edge
        for kind, intervals in enumerate((waits, work))
        for start, stop in intervals
        for edge in ((start, kind, 1), (stop, kind, -1))
    ]
    running = [0, 0]
    total = since = 0.0
    for moment, kind, change in sorted(edges):
        if running[0] and not running[1]:
            total += moment - since
        since = moment
        running[kind] += change
    return total


class Timers(Spans):
    """Spans that are also measured, on this rank: give one object to every layer.

    On a GPU each span is a pair of CUDA events in the current stream, read when asked for and not
    before, so that nothing waits. On a CPU it is the host's clock.
    """

    def __init__(self) -> None:
        self._done: list[Span] = []
        self._events: list[tuple[str, str, int, torch.cuda.Event, torch.cuda.Event]] = []
        self._base: torch.cuda.Event | None = None
        self._begin = time.perf_counter()

    @contextmanager
    def span(self, stage: str, kind: str, step: int, device: torch.device) -> Iterator[None]:
        """Open a span as `Spans.span`, and measure it."""
        if torch.compiler.is_compiling():
            yield
            return
        with super().span(stage, kind, step, device):
            if device.type == "cuda":
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                if self._base is None:
                    self._base = start
                yield
                stop.record()
                self._events.append((stage, kind, step, start, stop))
            else:
                start_s = time.perf_counter() - self._begin
                yield
                stop_s = time.perf_counter() - self._begin
                self._done.append(Span(stage, kind, step, start_s, stop_s))

    def spans(self) -> list[Span]:
        """Return all spans since `reset`, in order of their end; waits for a GPU to finish them."""
        for stage, kind, step, start, stop in self._events:
            stop.synchronize()
            assert self._base is not None
            edges = (self._base.elapsed_time(event) / 1e3 for event in (start, stop))
            self._done.append(Span(stage, kind, step, *edges))
        self._events.clear()
        return list(self._done)

    def waited(self, stage: str = "") -> float:
        """Return the seconds in which this rank waited for messages and computed nothing meanwhile.

        Args:
            stage: of waits whose stage starts so; "" for all.
        """
        spans = self.spans()
        waits = [s for s in spans if s.kind == "wait" and s.stage.startswith(stage)]
        work = [s for s in spans if s.kind == "compute"]
        return uncovered(*([(s.start, s.stop) for s in some] for some in (waits, work)))

    def rotation_share(self, step_seconds: float) -> float:
        """Return the share of `step_seconds` that this rank waited for the rotation's messages."""
        return self.waited() / step_seconds

    def reset(self) -> None:
        """Forget all spans; time starts again."""
        self._done.clear()
        self._events.clear()
        self._base = None
        self._begin = time.perf_counter()
