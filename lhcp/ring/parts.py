"""Whose gradients go where: pure functions from schedules to what each rank gives to each owner.

Every rank computes dk and dv of the keys that it attended to: parts, which their owners sum. A part
travels as the kernel wrote it and is summed wide at its owner, in one order: the same as sums that
travel wide, at half the bytes, and with nothing to send for keys that a rank did not see.

    zigzag, W = 4, gathered order 7 6 5 4 | 0 1 2 3; rank 1 holds chunks (1, 6)
    late chunk 6 saw  5 4 | 0 1 2 3:  slot 1 of ranks 2, 3; slot 0 of all ranks
    early chunk 1 saw 0:              slot 0 of rank 0
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from lhcp.comm.layout import Layout
from lhcp.ring.schedule import (
    Call,
    calls_by_keys,
    calls_by_queries,
    gathered_order,
    round_chunks,
)
from lhcp.ring.shape import Mask


@dataclass(frozen=True)
class Segment:
    """Parts of the keys in one slot of a gather, from the call of one run of query chunks."""

    q: tuple[int, int]
    """The run of query chunks, which names the call."""
    slot: int
    runs: tuple[tuple[int, int], ...]
    """For each rank that computes: the owners [start, stop) that it has a part for."""

    def sources(self, owner: int) -> tuple[int, ...]:
        """Return the ranks that have a part for `owner`, in the order in which it sums them."""
        return tuple(r for r, (start, stop) in enumerate(self.runs) if start <= owner < stop)


def cut_segments(calls: Sequence[Sequence[Call]], slots: int) -> tuple[Segment, ...]:
    """Return the segments of a gather's calls, slot by slot, the same on every rank.

        zigzag, W = 4: keys lie as 7 6 5 4 | 0 1 2 3, of owners 0 1 2 3 | 0 1 2 3
        slot 0, early chunks 0 1 2 3: runs (0, 0) (0, 1) (0, 2) (0, 3) of ranks 0 to 3
        slot 0, late chunks 7 6 5 4:  runs (0, 4) on every rank
        slot 1, late chunks:          runs (1, 4) (2, 4) (3, 4) (0, 0)

    Args:
        calls: of each rank of the gather, over keys in the order of `gathered_order`.
        slots: chunks of each rank.
    """
    world = len(calls)
    found = []
    for slot in range(slots):
        # A gather stores the last slot first.
        base = (slots - 1 - slot) * world
        for q in sorted({call.q for of_rank in calls for call in of_rank}):
            runs = []
            for of_rank in calls:
                start, stop = next((call.kv for call in of_rank if call.q == q), (0, 0))
                start, stop = (min(max(edge - base, 0), world) for edge in (start, stop))
                runs.append((start, stop) if start < stop else (0, 0))
            if any(start < stop for start, stop in runs):
                found.append(Segment(q, slot, tuple(runs)))
    return tuple(found)


@lru_cache(maxsize=8192)
def gather_segments(layout: Layout, mask: Mask, queries: range, keys: range) -> tuple[Segment, ...]:
    """Return the segments of a gather of the keys of ranks `keys` by the ranks `queries`.

    Owners count inside `keys`, which has as many ranks as `queries`.
    """
    order = gathered_order(layout, keys)
    calls = [
        calls_by_queries(layout.chunks(rank), order)
        if mask.causal
        else calls_by_keys(layout.chunks(rank), order, mask)
        for rank in queries
    ]
    return cut_segments(calls, layout.chunks_per_rank)


def parts_received(segments: Sequence[Segment], num_ranks: int) -> list[int]:
    """Count the chunks of which each rank gets parts, its own among them."""
    return [sum(len(segment.sources(rank)) for segment in segments) for rank in range(num_ranks)]


def parts_sent(segments: Sequence[Segment], num_ranks: int) -> list[int]:
    """Count the chunks of which each rank gives parts to other ranks."""
    sent = []
    for rank in range(num_ranks):
        runs = [segment.runs[rank] for segment in segments]
        sent.append(sum(stop - start - (start <= rank < stop) for start, stop in runs))
    return sent


@lru_cache(maxsize=8192)
def ring_route(
    rank: int, layout: Layout, mask: Mask, distances: range
) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Return where the keys of a round of the ring come from, and where those of `rank` go.

    Gradients of the keys that came go back the same way.

    Returns:
        The owner of each of this rank's `round_chunks`; (slot, receiver) of each chunk that leaves,
        in the order in which they travel.
    """

    def owners(of: int) -> list[tuple[int, int]]:
        return [layout.owner(chunk) for chunk in round_chunks(of, layout, mask, distances)]

    receivers = [(rank + distance) % layout.world_size for distance in distances]
    leaving = [(slot, to) for to in receivers for owner, slot in owners(to) if owner == rank]
    return tuple(owner for owner, _ in owners(rank)), tuple(leaving)


@lru_cache(maxsize=8192)
def ring_sources(
    rank: int, layout: Layout, mask: Mask, rounds: tuple[range, ...]
) -> tuple[tuple[int, ...], ...]:
    """Return, for each chunk of `rank`, the ranks that attend to it in these rounds of a ring.

    In the order of the rounds; its own rank is not one of them.
    """
    found: list[list[int]] = [[] for _ in range(layout.chunks_per_rank)]
    for distances in rounds:
        for slot, receiver in ring_route(rank, layout, mask, distances)[1]:
            found[slot].append(receiver)
    return tuple(map(tuple, found))
