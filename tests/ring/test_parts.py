"""Whose gradients go where: every key that a rank saw, once, to its owner. Integers only."""

from collections import Counter

import pytest

from lhcp.comm.layout import LAYOUTS, LayoutName, make_layout
from lhcp.ring.parts import gather_segments, ring_route, ring_sources
from lhcp.ring.schedule import round_chunks
from lhcp.ring.shape import Mask


def rounds_of(world: int, length: int) -> tuple[range, ...]:
    """Distances of a ring, so many a round."""
    starts = range(1, world, length)
    return tuple(range(start, min(start + length, world)) for start in starts)


def wanted(layout: LayoutName, world: int, queries: range, keys: range, causal: bool) -> Counter:
    """(source, owner's chunk) -> calls of the source that cover the chunk."""
    cut = make_layout(layout, world)
    found: Counter[tuple[int, int]] = Counter()
    for rank in queries:
        seen = [
            frozenset(k for r in keys for k in cut.chunks(r) if not causal or k < q)
            for q in cut.chunks(rank)
        ]
        for chunks in set(seen):
            found.update((rank, chunk) for chunk in chunks)
    return found


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("world", "size"), [(2, 2), (3, 3), (4, 4), (8, 8), (4, 2), (6, 3)])
def test_every_part_has_one_way_home(
    layout: LayoutName, world: int, size: int, causal: bool
) -> None:
    """Fails if a part is lost, sent twice, or summed into another chunk."""
    cut = make_layout(layout, world)
    nodes = [range(start, start + size) for start in range(0, world, size)]
    for queries in nodes:
        for keys in nodes:
            plan = gather_segments(cut, Mask(causal), queries, keys)
            assert [s.slot for s in plan] == sorted(s.slot for s in plan)
            sent: Counter[tuple[int, int]] = Counter()
            for segment in plan:
                for index, rank in enumerate(queries):
                    start, stop = segment.runs[index]
                    for owner in range(start, stop):
                        assert index in segment.sources(owner)
                        sent[rank, cut.chunks(keys[owner])[segment.slot]] += 1
                for owner in range(size):
                    assert list(segment.sources(owner)) == sorted(segment.sources(owner))
            assert sent == wanted(layout, world, queries, keys, causal)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("length", [1, 3])
def test_both_ends_of_a_ring_agree(
    layout: LayoutName, world: int, causal: bool, length: int
) -> None:
    """Fails if an owner waits for a part that nobody gives, or does not for one that comes."""
    cut = make_layout(layout, world)
    rounds = rounds_of(world, length)
    for start in range(len(rounds)):
        some = rounds[start : start + 2]
        given = Counter(
            (rank, chunk)
            for rank in range(world)
            for distances in some
            for chunk in round_chunks(rank, cut, Mask(causal), distances)
        )
        awaited = Counter(
            (source, cut.chunks(owner)[slot])
            for owner in range(world)
            for slot, sources in enumerate(ring_sources(owner, cut, Mask(causal), tuple(some)))
            for source in sources
        )
        assert given == awaited and set(given.values()) <= {1}
    seen = {
        (r, c) for r in range(world) for d in rounds for c in round_chunks(r, cut, Mask(causal), d)
    }
    everyone = range(world)
    others = {
        (rank, chunk)
        for rank, chunk in wanted(layout, world, everyone, everyone, causal)
        if chunk not in cut.chunks(rank)
    }
    assert seen == others


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("length", [1, 3])
def test_keys_arrive_in_the_order_in_which_they_leave(
    layout: LayoutName, world: int, causal: bool, length: int
) -> None:
    """Fails if a rank would take one of another's chunks for the other, or wait for none."""
    cut = make_layout(layout, world)
    for distances in rounds_of(world, length):
        routes = [ring_route(rank, cut, Mask(causal), distances) for rank in range(world)]
        for receiver, (owners, _) in enumerate(routes):
            chunks = round_chunks(receiver, cut, Mask(causal), distances)
            for sender, (_, leaving) in enumerate(routes):
                sent = [cut.chunks(sender)[slot] for slot, to in leaving if to == receiver]
                expected = [c for c, o in zip(chunks, owners, strict=True) if o == sender]
                assert sent == expected
