"""Rates that only a calibration needs: collectives beside messages, compute that bytes take."""

import statistics
import time
from collections.abc import Callable
from math import ceil
from typing import Any

import torch
import torch.distributed as dist

from lhcp.comm.collectives import Rows, Works, all_gathers, all_to_alls
from lhcp.comm.mesh import Ranks
from lhcp.measure.clock import seconds_of
from lhcp.measure.links import Clock, latency_and_rate, round_the_ring
from lhcp.measure.rank_values import slowest


def host_seconds(run: Callable[[], Any], device: torch.device, calls: int = 100) -> float:
    """Return what the host takes to launch a call whose kernels are shorter; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    run()
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    seconds = (time.perf_counter() - begin) / calls
    torch.cuda.synchronize(device)
    return seconds


def byte_compute(
    run: Callable[[], Any], rate: float, ranks: Ranks, repeats: int = 96, long: float = 0.05
) -> float:
    """Measure seconds that a byte, sent or received, adds to compute on CPU ranks; a collective.

    Measured beside compute, and not as the CPU time of ranks that only move bytes: the kernel's own
    part runs on whatever core is there, at the cost of nobody if that one is idle.

    Args:
        run: computes. rate: bytes a second of neighbour messages. long: seconds of compute. Many
            short ones, since over a slow link the difference is a few percent.
    """
    device = torch.device("cpu")
    calls = ceil(long / slowest(seconds_of(run, device), ranks))
    # They last about as long as the compute; of longer ones the part that was under way counts.
    num_bytes = int(min(2**26, max(2**10, rate * long)))
    messages = round_the_ring(num_bytes, ranks, device)

    def seconds(post: Callable[[], Works]) -> tuple[float, float]:
        """Time the compute, and until the messages are there as well, on the slowest rank."""
        dist.barrier(group=ranks.flat)
        begin = time.perf_counter()
        works = post()
        for _ in range(calls):
            run()
        computed = time.perf_counter() - begin
        works.wait()
        both = time.perf_counter() - begin
        return slowest(computed, ranks), slowest(both, ranks)

    alone, beside, moved = [], [], []
    for _ in range(repeats):
        alone.append(seconds(Works)[0])
        computed, both = seconds(messages)
        beside.append(computed)
        moved.append(2 * num_bytes * computed / both)
    added = statistics.median(beside) - statistics.median(alone)
    return max(0.0, added / statistics.median(moved))


def collective_factors(
    ranks: Ranks, device: torch.device, rate: float, large: int, clock: Clock
) -> tuple[float, float, float]:
    """Measure gathers and all-to-alls, four at once as rotations post them, over messages.

    Args:
        rate: bytes a second of neighbour messages; large: bytes of one rank's part; clock: as in
            `lhcp.measure.links.link`.

    Returns:
        time of a gather over that of as many bytes from neighbours; the same of an all-to-all;
        seconds of a gather without bytes.
    """
    world, ones = ranks.world_size, [1] * ranks.world_size
    assert ranks.flat is not None
    group = ranks.flat

    def gather(num_bytes: int) -> Callable[[], None]:
        source = torch.ones(4, num_bytes // 16, device=device)
        into = torch.ones(4, world * num_bytes // 16, device=device)

        def run() -> None:
            all_gathers(list(zip(into, source, strict=True)), group).wait()

        return run

    def all_to_all(num_bytes: int) -> Callable[[], None]:
        source, into = torch.ones(2, 4, world, num_bytes // 16, device=device)

        def run() -> None:
            rows = [Rows(into[i], ones, source[i], ones) for i in range(4)]
            all_to_alls(rows, group).wait()

        return run

    latency, gathered = latency_and_rate(gather, large, ranks, device, clock)
    _, exchanged = latency_and_rate(all_to_all, large, ranks, device, clock)
    return rate / (gathered * (world - 1)), rate / (exchanged * (world - 1)), latency
