"""Whose gradients go where: every key that a rank saw, once, to its owner. Integers only."""

from collections import Counter

import pytest

from lhcp.layout import LAYOUTS, LayoutName, make_layout
from lhcp.ring.parts import gather_segments, shard_run


def wanted(layout: LayoutName, world: int, queries: range, keys: range, causal: bool) -> Counter:
    """(giver, owner's chunk) -> calls of the giver that cover the chunk."""
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
            plan = gather_segments(cut, causal, queries, keys)
            assert [s.slot for s in plan] == sorted(s.slot for s in plan)
            sent: Counter[tuple[int, int]] = Counter()
            for segment in plan:
                for place, rank in enumerate(queries):
                    start, stop = segment.runs[place]
                    for owner in range(start, stop):
                        assert place in segment.givers(owner)
                        sent[rank, cut.chunks(keys[owner])[segment.slot]] += 1
                for owner in range(size):
                    assert list(segment.givers(owner)) == sorted(segment.givers(owner))
            assert sent == wanted(layout, world, queries, keys, causal)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", [2, 3, 8])
def test_runs_of_a_ring(layout: LayoutName, world: int, causal: bool) -> None:
    """Fails if the two ends of a message of the ring would not agree on its size."""
    cut = make_layout(layout, world)
    for rank in range(world):
        for owner in set(range(world)) - {rank}:
            start, stop = shard_run(cut, causal, rank, owner)
            seen = {
                slot
                for slot, k in enumerate(cut.chunks(owner))
                if not causal or any(k < q for q in cut.chunks(rank))
            }
            assert set(range(start, stop)) == seen
