"""Who attends to what: every pair of chunks once, whatever the rotation. Integers only."""

import math
from collections import Counter
from dataclasses import replace

import pytest

from lhcp.comm.layout import LAYOUTS, Layout, LayoutName, make_layout
from lhcp.ring.schedule import (
    Step,
    allgather_steps,
    chunks_at,
    gathered_order,
    hierarchical_steps,
    p2p_steps,
    round_chunks,
)
from lhcp.ring.shape import CAUSAL, FULL, AttentionShape, Mask, Tuning, split_heads

HEADS = 4


LENGTHS = {"p2p": 1, "p2p2": 2, "p2p*": 10**6}
"""Distances in a round of the ring, up to half of all."""


SPLIT = {"min_hidden_bytes": 0, "min_hiding_pairs": 0}
"""A part of the own keys comes last, however short."""


def shape_of(rotation: str, world: int, layout: LayoutName, causal: bool) -> AttentionShape:
    """A small attention that is cut up as the rotation's name says."""
    length = LENGTHS.get(rotation.removesuffix(" back").removesuffix(" split"), 1)
    return AttentionShape(
        seqlen=4 * world,
        layout=make_layout(layout, world),
        num_heads=HEADS,
        num_kv_heads=HEADS,
        head_dim=8,
        mask=Mask(causal),
        node_size=int(rotation[-1]) if rotation.startswith("node") else None,
        tuning=Tuning(
            round_length=max(1, min(length, world // 2)),
            num_head_groups=int(rotation[-1]) if rotation.startswith("allgather") else 0,
            **SPLIT if "split" in rotation else {},
        ),
    )


def deliveries(
    rotation: str, rank: int, shape: AttentionShape
) -> list[tuple[Step, tuple[int, ...]]]:
    """Steps, each with the chunks of keys that it is given, in order."""
    layout, world, mine = shape.layout, shape.world_size, shape.layout.chunks(rank)
    if rotation.startswith("p2p"):
        steps = p2p_steps(shape, rank, rotation.endswith("back"))
        keys = [round_chunks(rank, layout, shape.mask, distances) for distances in shape.rounds]
        if rotation.endswith("back") and shape.splits_own:
            keys.append(mine)
        return list(zip(steps, [mine, *keys], strict=True))
    if rotation.startswith("allgather"):
        steps = allgather_steps(shape, rank)
        everything = [gathered_order(layout, range(world))] * len(shape.head_groups)
    else:
        steps = hierarchical_steps(shape, rank)
        size, nodes = world // shape.num_nodes, shape.num_nodes
        everything = []
        for j in range(nodes):
            node = (rank // size - j) % nodes
            everything.append(gathered_order(layout, range(node * size, (node + 1) * size)))
    return list(zip(steps, [mine] * shape.mask.causal + everything, strict=True))


CASES = [
    (rotation, world, layout)
    for layout in LAYOUTS
    for world in (1, 2, 3, 4, 6, 8)
    for rotation in (
        *("p2p", "p2p2", "p2p*", "p2p back", "p2p2 back", "p2p* back"),
        *("p2p split back", "p2p2 split back", "p2p* split back"),
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
    shape = shape_of(rotation, world, layout, causal)
    cut = shape.layout
    for rank in range(world):
        mine = cut.chunks(rank)
        met: Counter[tuple[int, int, int]] = Counter()
        triangles: Counter[tuple[int, int]] = Counter()
        for step, keys in deliveries(rotation, rank, shape):
            for call in step.calls:
                queries, run = mine[slice(*call.q)], keys[slice(*call.kv)]
                for head in range(*step.heads):
                    if call.mask.causal:
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


def test_a_part_of_the_own_keys_comes_last_where_it_hides_something() -> None:
    """Fails if it is kept back where that is a call for nothing, or where there is none to keep."""
    shape = shape_of("p2p split back", 4, "zigzag", True)
    assert shape.splits_own
    steps = p2p_steps(shape, 1, True)
    assert [step.last for step in steps] == [False] * 4 + [True]
    assert steps[0].calls[0].per_chunk and not p2p_steps(shape, 1, False)[-1].last
    assert not replace(shape, tuning=Tuning()).splits_own, "short"
    assert not replace(shape, mask=FULL).splits_own
    assert not replace(shape, mask=Mask(True, 1, 1, 1)).splits_own, "documents"
    assert not shape_of("p2p split back", 4, "contiguous", True).splits_own
    assert not replace(shape, layout=make_layout("zigzag", 1)).splits_own
    # The layer at 32K on two ranks, L=3, p=4, k=1536, 8 heads of 128: 170 us and 80 us or more.
    long = replace(shape, seqlen=14_336, layout=make_layout("zigzag", 2), tuning=Tuning())
    long = replace(long, num_heads=8, num_kv_heads=8, head_dim=128)
    assert long.splits_own and long.gives_head_start
    assert not replace(long, num_kv_heads=2).splits_own, "little to send"


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("rotation", "world", "layout"), CASES)
def test_steps_are_the_same_in_number_and_start_with_every_query(
    rotation: str, world: int, layout: LayoutName, causal: bool
) -> None:
    """Fails if ranks would send different numbers of messages, or merge into unwritten memory."""
    shape = shape_of(rotation, world, layout, causal)
    cut = shape.layout
    per_rank = [deliveries(rotation, rank, shape) for rank in range(world)]
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
    pairs = -(-Tuning().min_round_pairs // share)
    # One head, and queries x keys of one distance: a block of so many pairs.
    shape = AttentionShape(
        seqlen=world,
        layout=Layout("contiguous", world),
        num_heads=pairs,
        num_kv_heads=1,
        head_dim=1,
    )
    rounds = shape.rounds
    assert [d for distances in rounds for d in distances] == list(range(1, world))
    lengths = [len(distances) for distances in rounds]
    assert set(lengths[:-1]) <= {lengths[0]} and lengths[-1] <= lengths[0]
    assert lengths[0] == min(share, math.ceil((world - 1) / 2))


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_calls_of_long_tiles_come_first(layout: LayoutName, world: int) -> None:
    """Fails if a step of the ring ends with its longest tiles, which leave a long last wave."""
    forward, backward = (shape_of(name, world, layout, True) for name in ("p2p*", "p2p* back"))
    for rank in range(world):
        for step, _ in deliveries("p2p*", rank, forward):
            keys = [call.num_keys for call in step.calls]
            assert keys == sorted(keys, reverse=True)
        for step, _ in deliveries("p2p* back", rank, backward):
            queries = [call.q[1] - call.q[0] for call in step.calls]
            assert queries == sorted(queries, reverse=True)


@pytest.mark.parametrize(("heads", "groups"), [(8, 4), (8, 3), (6, 4), (1, 8), (5, 2), (7, 0)])
def test_head_groups_are_equal_runs(heads: int, groups: int) -> None:
    runs = split_heads(heads, groups)
    assert [h for run in runs for h in range(*run)] == list(range(heads))
    assert len({stop - start for start, stop in runs}) == 1
    assert len(runs) <= max(groups, 1)


@pytest.mark.parametrize("mask", [CAUSAL, FULL], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_at_a_distance_are_counted(layout: LayoutName, mask: Mask) -> None:
    """Fails if the count that the cost model reads is not of the chunks that come."""
    cut = make_layout(layout, 7)
    for d in range(1, 7):
        came = [len(round_chunks(rank, cut, mask, range(d, d + 1))) for rank in range(7)]
        assert chunks_at(cut, mask, d) == came


def test_a_shape_decides_once() -> None:
    """Fails if a threshold is read from anywhere but the shape's tuning."""
    shape = AttentionShape(
        seqlen=2**16, layout=make_layout("zigzag", 8), num_heads=8, num_kv_heads=8, head_dim=128
    )
    assert [len(r) for r in shape.rounds] == [4, 3] and len(shape.head_groups) == 1
    assert shape.round_bytes == 4 * shape.kv_bytes and shape.group_bytes == 8 * shape.kv_bytes
    assert shape.holds_all_parts and shape.steps_left(shape.round_bytes) == 2
    tuned = replace(shape, tuning=Tuning(round_length=2, num_head_groups=4, held_bytes=1))
    assert [len(r) for r in tuned.rounds] == [2, 2, 2, 1] and len(tuned.head_groups) == 4
    assert tuned.round_bytes == 2 * shape.kv_bytes and tuned.group_bytes == 2 * shape.kv_bytes
    assert not tuned.holds_all_parts and tuned.steps_left(tuned.round_bytes) == 1
    half = replace(shape, wire_bytes=1)
    assert half.kv_bytes * 2 == shape.kv_bytes and half.q_bytes == shape.q_bytes
