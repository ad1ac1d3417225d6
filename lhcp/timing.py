"""Named, timed spans: every stage and ring step in a profile, and how long the rotation waited."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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


UNTIMED = Spans()


@dataclass(frozen=True)
class Span:
    """One measured range."""

    stage: str
    kind: str
    step: int
    seconds: float


class Timers(Spans):
    """Spans that are also measured, on this rank: give one object to every layer.

    On a GPU each span is a pair of CUDA events in the current stream, read when asked for and not
    before, so that nothing waits. On a CPU it is the host's clock.
    """

    def __init__(self) -> None:
        self._done: list[Span] = []
        self._events: list[tuple[str, str, int, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def span(self, stage: str, kind: str, step: int, device: torch.device) -> Iterator[None]:
        with super().span(stage, kind, step, device):
            if device.type == "cuda":
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                yield
                stop.record()
                self._events.append((stage, kind, step, start, stop))
            else:
                begin = time.perf_counter()
                yield
                self._done.append(Span(stage, kind, step, time.perf_counter() - begin))

    def spans(self) -> list[Span]:
        """Return all spans since `reset`, in order of their end; waits for a GPU to finish them."""
        for stage, kind, step, start, stop in self._events:
            stop.synchronize()
            self._done.append(Span(stage, kind, step, start.elapsed_time(stop) / 1e3))
        self._events.clear()
        return list(self._done)

    def seconds(self, kind: str, stage: str = "") -> float:
        """Sum of the spans of one kind, of all stages or of those that start with `stage`."""
        return sum(s.seconds for s in self.spans() if s.kind == kind and s.stage.startswith(stage))

    def rotation_share(self, step_seconds: float) -> float:
        """Share of `step_seconds` that this rank spent waiting for the rotation's messages."""
        return self.seconds("wait") / step_seconds

    def reset(self) -> None:
        """Forget all spans."""
        self._done.clear()
        self._events.clear()
