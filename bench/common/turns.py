"""Timing on one GPU: interleaved medians with their spread, CUDA graphs, the two ceilings."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]

# Several times the L2 of any GPU so far, so that what a run reads is not left there by another.
BEYOND_CACHE = 2**28

# A run this long is warm after one, and too long to throw a second away.
LONG_MS = 500.0


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of one arm, ms."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, samples: list[float]) -> "Spread":
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(statistics.median(samples), low, high, len(samples))

    def __str__(self) -> str:
        digits = 3 if self.median < 100 else 1
        half = 50 * (self.high - self.low) / self.median
        return f"{self.median:.{digits}f} ±{half:.1f}%"


@dataclass(frozen=True)
class Arm:
    """One thing to time: called back to back until `target_ms` have passed, in up to `rounds`."""

    run: Run
    rounds: int = 11
    target_ms: float = 40.0
    most_calls: int = 16
    """In a row, however short they are."""


def interleaved(arms: dict[str, Arm]) -> dict[str, Spread]:
    """Time the arms in turn, there and back again, so that all of them see the same clocks.

    A sample is the time of a few calls in a row on a GPU that was idle before: what one call costs
    in a run of many, host included where the host is the slower one.
    """
    inner, samples = {}, {}
    for name, arm in arms.items():
        arm.run()
        once = sample(arm.run, 1)
        inner[name] = max(1, min(arm.most_calls, int(arm.target_ms / once)))
        samples[name] = [once] if once > LONG_MS else []
    for i in range(max(arm.rounds for arm in arms.values())):
        for name, arm in list(arms.items())[:: -1 if i % 2 else 1]:
            if len(samples[name]) < arm.rounds:
                samples[name].append(sample(arm.run, inner[name]))
    return {name: Spread.of(found) for name, found in samples.items()}


def sample(run: Run, calls: int) -> float:
    """Milliseconds a call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def kernel_time(run: Run, repeats: int = 25) -> Spread:
    """Time of a launcher's kernels: a large write before each run clears L2 and hides the host."""
    flush = torch.empty(BEYOND_CACHE, dtype=torch.int8, device="cuda")
    for _ in range(3):
        run()
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(repeats)] for _ in "ab")
    for start, end in zip(starts, ends, strict=True):
        # Twice: the host needs more than one such write to get ahead of a launcher of two kernels.
        flush.zero_()
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return Spread.of([s.elapsed_time(e) for s, e in zip(starts, ends, strict=True)])


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
    turn = 0

    def next_run() -> Any:
        nonlocal turn
        turn += 1
        return run(*inputs[turn % len(inputs)])

    return next_run


def copy_bandwidth() -> float:
    """Bytes read and written a second by a device-to-device copy of 2 GiB."""
    source = torch.randint(-100, 100, (2**31,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (kernel_time(lambda: target.copy_(source)).median * 1e-3)


def matmul_rate() -> float:
    """bf16 floating-point operations a second of an 8192^3 product."""
    size = 8192
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * size**3 / (kernel_time(lambda: a @ b).median * 1e-3)


def peak_beyond(run: Run, results: int) -> float:
    """GiB that a call holds at its peak beyond what was there before and its `results` bytes."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = run()
    torch.cuda.synchronize()
    del kept
    return (torch.cuda.max_memory_allocated() - before - results) / 2**30
