"""What a machine does in a second: copies, messages between ranks, collectives; how it is timed."""

import statistics
import time
from collections.abc import Callable
from math import ceil
from typing import Any

import torch
import torch.distributed as dist

from lhcp.comm.collectives import Rows, Works, all_gathers, all_to_alls, exchange
from lhcp.comm.mesh import Ranks


def seconds_of(run: Callable[[], Any], device: torch.device, repeats: int = 7) -> float:
    """Median seconds of a call, on the GPU's clock where there is one; three unmeasured before."""
    found = []
    for repeat in range(repeats + 3):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            start.record()
            run()
            stop.record()
            stop.synchronize()
            seconds = start.elapsed_time(stop) / 1e3
        else:
            begin = time.perf_counter()
            run()
            seconds = time.perf_counter() - begin
        if repeat >= 3:
            found.append(seconds)
    return statistics.median(found)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy, read and written counted."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.ones(size, dtype=torch.uint8, device=device)
    into = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: into.copy_(source), device)


def long_message(device: torch.device) -> int:
    """Bytes of a message that gives the bandwidth: 64 MiB on a GPU, 4 MiB on a CPU."""
    return 2**26 if device.type == "cuda" else 2**22


def link(ranks: Ranks, device: torch.device, large: int | None = None) -> dict[str, float]:
    """Latency and bandwidth of messages round the ring of ranks, all ranks at once.

    Args:
        large: bytes of the long message; None: `long_message`.

    Returns:
        latency_us, gb_s: of the slowest rank; a message takes latency + bytes / bandwidth.
    """
    large = large or long_message(device)

    def run(num_bytes: int) -> Callable[[], None]:
        post = round_the_ring(num_bytes, ranks, device)
        return lambda: post().wait()

    latency, rate = latency_and_rate(run, large, ranks, device)
    return {"latency_us": 1e6 * latency, "gb_s": rate / 1e9}


def round_the_ring(num_bytes: int, ranks: Ranks, device: torch.device) -> Callable[[], Works]:
    """Return what posts messages to the next rank and from the previous, as rotations do."""
    assert ranks.flat is not None
    group, rank, world = ranks.flat, ranks.rank, ranks.world_size
    out, into = (torch.ones(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    return lambda: exchange([(out, (rank + 1) % world)], [(into, (rank - 1) % world)], group)


def byte_compute(
    run: Callable[[], Any], rate: float, ranks: Ranks, repeats: int = 96, long: float = 0.05
) -> float:
    """Seconds that a byte, sent or received, adds to compute on CPU ranks; a collective.

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
        """Of the compute, and until the messages are there as well: of the slowest rank."""
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


def latency_and_rate(
    make: Callable[[int], Callable[[], None]], large: int, ranks: Ranks, device: torch.device
) -> tuple[float, float]:
    """Seconds without bytes, and bytes a second, of what make(bytes) returns; a collective."""

    def seconds(num_bytes: int, repeats: int) -> float:
        run = make(num_bytes)
        run()
        dist.barrier(group=ranks.flat)
        return slowest(seconds_of(run, device, repeats), ranks)

    # A short one that waits for a core takes a scheduler's tick, 4 ms, where others take a tenth of
    # it. Many cost nothing and leave the median less to chance; ticks that stay are the latency.
    small = 1024
    short, long = seconds(small, 99), seconds(large, 7)
    # Where a long message takes no longer than a short one, all of its time is its bytes'.
    rate = (large - small) / (long - short) if long > short else large / long
    return max(short - small / rate, 0.0), rate


def collective_factors(
    ranks: Ranks, device: torch.device, rate: float, large: int
) -> tuple[float, float, float]:
    """Gathers and all-to-alls, four at once as rotations post them, over neighbour messages.

    Args:
        rate: bytes a second of neighbour messages; large: bytes of one rank's part.

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

    latency, gathered = latency_and_rate(gather, large, ranks, device)
    _, exchanged = latency_and_rate(all_to_all, large, ranks, device)
    return rate / (gathered * (world - 1)), rate / (exchanged * (world - 1)), latency


def slowest(seconds: float, ranks: Ranks) -> float:
    """The largest of all ranks' seconds; a collective."""
    everybody = [seconds] * ranks.world_size
    if ranks.world_size > 1:
        dist.all_gather_object(everybody, seconds, group=ranks.flat)
    return max(everybody)
