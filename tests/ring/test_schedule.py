"""Who attends to what: every pair of chunks once, whatever the rotation. Integers only."""

import math
from collections import Counter

import pytest

from lhcp.comm.layout import LAYOUTS, Layout, LayoutName, make_layout
from lhcp.ring.rotation.allgather import split_heads
from lhcp.ring.schedule import (
    MIN_ROUND_PAIRS,
    Step,
    allgather_steps,
    gathered_order,
    hierarchical_steps,
    p2p_steps,
    ring_rounds,
    round_chunks,
)

HEADS = 4


def deliveries(
    rotation: str, rank: int, layout: Layout, causal: bool
) -> list[tuple[Step, tuple[int, ...]]]:
    """Steps, each with the chunks of keys that it is given, in order."""
    world, mine = layout.world_size, layout.chunks(rank)
    if rotation.startswith("p2p"):
        # Blocks that are large enough, half so, or hopelessly small.
        pairs = {"p2p": MIN_ROUND_PAIRS, "p2p2": MIN_ROUND_PAIRS // 2, "p2p*": 1}
        rounds = ring_rounds(world, pairs[rotation.removesuffix(" back")])
        steps = p2p_steps(rank, layout, causal, HEADS, rounds, rotation.endswith("back"))
        keys = [round_chunks(rank, layout, causal, distances) for distances in rounds]
        return list(zip(steps, [mine, *keys], strict=True))
    if rotation.startswith("allgather"):
        groups = split_heads(HEADS, int(rotation[-1]))
        steps = allgather_steps(rank, layout, causal, groups)
        everything = [gathered_order(layout, range(world))] * len(groups)
    else:
        size = int(rotation[-1])
        steps = hierarchical_steps(rank, layout, causal, HEADS, size)
        nodes = world // size
        everything = []
        for j in range(nodes):
            node = (rank // size - j) % nodes
            everything.append(gathered_order(layout, range(node * size, (node + 1) * size)))
    return list(zip(steps, [mine] * causal + everything, strict=True))


CASES = [
    (rotation, world, layout)
    for layout in LAYOUTS
    for world in (1, 2, 3, 4, 6, 8)
    for rotation in (
        *("p2p", "p2p2", "p2p*", "p2p back", "p2p2 back", "p2p* back"),
        *("allgather1", "allgather2", "allgather4", "node1", "node2", "node3"),
    )
    if not rotation.startswith("node") or world % int(rotation[-1]) == 0
    if world > 1 or rotation == "p2p"
]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("rotation", "world", "layout"), CASES)
def test_every_pair_that_may_meet_meets_once(
    rotation: str, world: int, layout: LayoutName, causal: bool
) -> None:
    """Fails if a block is computed twice, never, or against the mask."""
    cut = make_layout(layout, world)
    for rank in range(world):
        mine = cut.chunks(rank)
        met: Counter[tuple[int, int, int]] = Counter()
        triangles: Counter[tuple[int, int]] = Counter()
        for step, keys in deliveries(rotation, rank, cut, causal):
            for call in step.calls:
                queries, run = mine[slice(*call.q)], keys[slice(*call.kv)]
                for head in range(*step.heads):
                    if call.causal:
                        assert queries == run
                        for i, q in enumerate(queries):
                            triangles[q, head] += 1
                            if not call.per_chunk:
                                met.update((q, key, head) for key in run[:i])
                    else:
                        met.update((q, key, head) for q in queries for key in run)
        wanted = {
            (q, key, head)
            for q in mine
            for key in range(cut.num_chunks)
            for head in range(HEADS)
            if not causal or key < q
        }
        assert set(met) == wanted and set(met.values()) <= {1}
        if causal:
            assert triangles == {(q, head): 1 for q in mine for head in range(HEADS)}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("rotation", "world", "layout"), CASES)
def test_steps_are_the_same_in_number_and_start_with_every_query(
    rotation: str, world: int, layout: LayoutName, causal: bool
) -> None:
    """Fails if ranks would send different numbers of messages, or merge into unwritten memory."""
    cut = make_layout(layout, world)
    per_rank = [deliveries(rotation, rank, cut, causal) for rank in range(world)]
    assert len({tuple(step.heads for step, _ in steps) for steps in per_rank}) == 1
    for steps in per_rank:
        written: set[tuple[int, int]] = set()
        for step, _ in steps:
            for call in step.calls:
                touched = {(c, h) for c in range(*call.q) for h in range(*step.heads)}
                if step.first:
                    assert not touched & written
                    written |= touched
                else:
                    assert touched <= written
        assert written == {(c, h) for c in range(cut.chunks_per_rank) for h in range(HEADS)}


@pytest.mark.parametrize("world", [2, 3, 4, 7, 8, 32])
@pytest.mark.parametrize("share", [1, 2, 3, 4, 1000])
def test_rounds_are_equal_and_no_longer_than_needed(world: int, share: int) -> None:
    """Fails if a distance is lost, or a round longer than a large block or half of the others."""
    rounds = ring_rounds(world, -(-MIN_ROUND_PAIRS // share))
    assert [d for distances in rounds for d in distances] == list(range(1, world))
    lengths = [len(distances) for distances in rounds]
    assert set(lengths[:-1]) <= {lengths[0]} and lengths[-1] <= lengths[0]
    assert lengths[0] == min(share, math.ceil((world - 1) / 2))


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_calls_of_long_tiles_come_first(layout: LayoutName, world: int) -> None:
    """Fails if a step of the ring ends with its longest tiles, which leave a long last wave."""
    for rank in range(world):
        for step, _ in deliveries("p2p*", rank, make_layout(layout, world), True):
            keys = [call.num_keys for call in step.calls]
            assert keys == sorted(keys, reverse=True)
        for step, _ in deliveries("p2p* back", rank, make_layout(layout, world), True):
            queries = [call.q[1] - call.q[0] for call in step.calls]
            assert queries == sorted(queries, reverse=True)


@pytest.mark.parametrize(("heads", "groups"), [(8, 4), (8, 3), (6, 4), (1, 8), (5, 2), (7, 0)])
def test_head_groups_are_equal_runs(heads: int, groups: int) -> None:
    runs = split_heads(heads, groups)
    assert [h for run in runs for h in range(*run)] == list(range(heads))
    assert len({stop - start for start, stop in runs}) == 1
    assert len(runs) <= max(groups, 1)
