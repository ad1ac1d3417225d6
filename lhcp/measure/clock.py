"""Clocks: how long a call takes, on the GPU's clock where there is one; the two ceilings."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from lhcp.layer.recorder import CudaRecorder

Run = Callable[[], Any]

IN_A_GRAPH = 10
"""Calls of a graph that is timed."""

# Several times the L2 of any GPU so far, so that what a run reads is not left there by another.
BEYOND_CACHE = 2**28


def elapsed(run: Run, device: torch.device, calls: int = 1) -> float:
    """Return seconds a call, of calls in a row on a device that was idle before."""
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - begin) / calls
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(calls):
        run()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3 / calls


def seconds_of(run: Run, device: torch.device, repeats: int = 7) -> float:
    """Return the median seconds of a call; three unmeasured before."""
    return statistics.median([elapsed(run, device) for _ in range(repeats + 3)][3:])


def launched_seconds(run: Run, device: torch.device, repeats: int = 7) -> float:
    """Return the seconds of a call among ten whose launching costs nothing: those of a CUDA graph.

    A short kernel or message takes its host longer than its GPU. On a CPU as `seconds_of`.

    Args:
        run: what a graph can hold; of a message, the same on every rank.
    """
    if device.type != "cuda":
        return seconds_of(run, device, repeats)

    def row() -> tuple[()]:
        for _ in range(IN_A_GRAPH):
            run()
        return ()

    # Kernels are compiled, and NCCL connects, in what is not recorded.
    row()
    torch.cuda.synchronize(device)
    _, replay = CudaRecorder().record(row)
    found = [elapsed(replay, device) for _ in range(min(repeats, 5) + 1)]
    return statistics.median(found[1:]) / IN_A_GRAPH


def sustained_seconds(run: Run, device: torch.device, least: float) -> float:
    """Return seconds of a call among calls in a row, after as many unmeasured: at a step's clocks.

    An idle GPU runs a first call faster than a long step, which has its heat and power, does.

    Args:
        least: how long the measured calls should take in all.
    """
    if device.type != "cuda":
        run()
        return elapsed(run, device)
    calls = 1
    for _ in range(3):
        seconds = elapsed(run, device, calls)
        calls = max(1, min(200, round(least / seconds)))
    return seconds


def kernel_seconds(run: Run, repeats: int = 25) -> list[float]:
    """Time a launcher's kernels: large writes before each run clear L2 and hide the host."""
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
    return [s.elapsed_time(e) / 1e3 for s, e in zip(starts, ends, strict=True)]


def copy_bandwidth(device: torch.device) -> float:
    """Return bytes a second of a large copy, read and written counted."""
    cuda = device.type == "cuda"
    source = torch.randint(-100, 100, (2**31 if cuda else 2**26,), dtype=torch.int8, device=device)
    into = torch.empty_like(source)

    def copy() -> None:
        into.copy_(source)

    seconds = statistics.median(kernel_seconds(copy)) if cuda else seconds_of(copy, device)
    num_bytes = 2 * source.nbytes
    if cuda:
        # Ranks may share the GPU, and what follows may need its memory.
        del source, into, copy
        torch.cuda.empty_cache()
    return num_bytes / seconds


def matmul_rate(device: torch.device) -> float:
    """Return FLOP/s of an 8192^3 bf16 product of random numbers (512^3 without a GPU)."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / sustained_seconds(lambda: torch.mm(a, b), device, 0.1)


def peak_gib(run: Run, device: torch.device) -> float:
    """Return the GiB that this process holds on the GPU at most during a call."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    kept = run()
    torch.cuda.synchronize(device)
    del kept
    return torch.cuda.max_memory_allocated(device) / 2**30
