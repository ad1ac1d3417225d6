"""Links between ranks: latency and bandwidth of messages, posted as rotations post them."""

from collections.abc import Callable, Mapping
from itertools import combinations, pairwise

import torch
import torch.distributed as dist

from lhcp.comm.collectives import Works, all_gathers, exchange
from lhcp.comm.mesh import Ranks
from lhcp.measure.clock import Run, seconds_of
from lhcp.measure.rank_values import barrier, slowest

Clock = Callable[[Run, torch.device, int], float]
"""(run, device, repeats) -> seconds of a run."""


def long_message(device: torch.device) -> int:
    """Return the bytes of a message that gives the bandwidth: 64 MiB on a GPU, 4 MiB on a CPU."""
    return 2**26 if device.type == "cuda" else 2**22


def link(
    ranks: Ranks, device: torch.device, large: int | None = None, clock: Clock = seconds_of
) -> dict[str, float]:
    """Measure latency and bandwidth of messages round the ring of ranks, all ranks at once.

    Args:
        large: bytes of the long message; None: `long_message`.
        clock: `seconds_of` as the host posts them, or `launched_seconds`.

    Returns:
        latency_us, gb_s: of the slowest rank; a message takes latency + bytes / bandwidth.
    """
    large = large or long_message(device)

    def run(num_bytes: int) -> Callable[[], None]:
        post = round_the_ring(num_bytes, ranks, device)
        return lambda: post().wait()

    latency, rate = latency_and_rate(run, large, ranks, device, clock)
    return {"latency_us": 1e6 * latency, "gb_s": rate / 1e9}


def round_the_ring(num_bytes: int, ranks: Ranks, device: torch.device) -> Callable[[], Works]:
    """Return what posts messages to the next rank and from the previous, as rotations do."""
    assert ranks.flat is not None
    group, rank, world = ranks.flat, ranks.rank, ranks.world_size
    out, into = (torch.ones(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    return lambda: exchange([(out, (rank + 1) % world)], [(into, (rank - 1) % world)], group)


def latency_and_rate(
    make: Callable[[int], Run],
    large: int,
    ranks: Ranks,
    device: torch.device,
    clock: Clock = seconds_of,
) -> tuple[float, float]:
    """Measure seconds without bytes, and bytes a second, of what make(bytes) returns."""

    def seconds(num_bytes: int, repeats: int) -> float:
        run = make(num_bytes)
        run()
        dist.barrier(group=ranks.flat)
        return slowest(clock(run, device, repeats), ranks)

    # A short one that waits for a core takes a scheduler's tick, 4 ms, where others take a tenth of
    # it. Many cost nothing and leave the median less to chance; ticks that stay are the latency.
    small = 1024
    short, long = seconds(small, 99), seconds(large, 7)
    # Where a long message takes no longer than a short one, all of its time is its bytes'.
    rate = (large - small) / (long - short) if long > short else large / long
    return max(short - small / rate, 0.0), rate


def gather_rate(ranks: Ranks, device: torch.device, large: int | None = None) -> float:
    """Return bytes a second that each rank receives in an all-gather; a collective."""
    group = ranks.flat
    assert group is not None
    num_bytes, world = large or long_message(device), ranks.world_size
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    into = torch.empty(world * num_bytes, dtype=torch.uint8, device=device)

    def run() -> None:
        all_gathers([(into, source)], group).wait()

    run()
    return (world - 1) * num_bytes / slowest(seconds_of(run, device, 5), ranks)


def pair_rates(
    ranks: Ranks, device: torch.device, large: int | None = None
) -> dict[tuple[int, int], float]:
    """Return bytes a second of each pair of ranks, both ways at once, all others idle.

    A collective; the same on every rank.
    """
    assert ranks.flat is not None
    num_bytes, group = large or long_message(device) // 4, ranks.flat
    out, into = (torch.ones(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    found = {}
    for pair in combinations(range(ranks.world_size), 2):
        seconds = 0.0
        barrier(ranks, device)
        if ranks.rank in pair:
            other = pair[1 - pair.index(ranks.rank)]

            def run(other: int = other) -> None:
                exchange([(out, other)], [(into, other)], group).wait()

            seconds = seconds_of(run, device, 3)
        found[pair] = num_bytes / slowest(seconds, ranks)
    return found


def islands(rates: Mapping[tuple[int, int], float], gap: float) -> list[list[int]]:
    """Return the ranks that quick pairs join, directly or through others, in order.

    Rates have a widest gap, from one to the next by their ratio, and pairs above it are quick: a
    pair of a node that was held up is still nearer to the others of nodes than to a network.

    Args:
        rates: of each pair of ranks.
        gap: what the widest one must be; where none is, all pairs are quick.
    """
    ordered = sorted(rates.values())
    widest, least = max(((b / a, b) for a, b in pairwise(ordered)), default=(1.0, 0.0))
    quick = [pair for pair, rate in rates.items() if widest < gap or rate >= least]
    found = [{rank} for rank in sorted({rank for pair in rates for rank in pair})]
    for pair in quick:
        joined = set[int]().union(*(island for island in found if island & set(pair)))
        found = [joined, *(island for island in found if not island & joined)]
    return sorted(map(sorted, found))
