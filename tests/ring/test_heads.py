"""Who shares heads with whom, and what is left: integers alone."""

from dataclasses import replace

import pytest

from lhcp.comm.layout import LAYOUTS, LayoutName, make_layout
from lhcp.ring.heads import (
    SHARE_HEADS,
    exchange_ranks,
    fits,
    kv_copies,
    partners,
    ring_ranks,
    shape_left,
    sharing_ranks,
)
from lhcp.ring.shape import AttentionShape

MESHES = [(1, 4), (4, 1), (2, 2), (2, 3), (3, 2), (2, 4), (4, 2), (4, 8)]


@pytest.mark.parametrize(("nodes", "inner"), MESHES)
@pytest.mark.parametrize("rotation", SHARE_HEADS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_has_the_tokens_of_its_place_in_the_ring(
    layout: LayoutName, rotation: str, nodes: int, inner: int
) -> None:
    """Fails if tokens and heads do not come together to one rank each, or not as the ring's layout
    has them, in this order."""
    world = nodes * inner
    flat, sharing = make_layout(layout, world), sharing_ranks(rotation, world, inner)
    if sharing == 1:
        pytest.skip("nothing is exchanged")
    among, left = make_layout(layout, sharing), make_layout(layout, world // sharing)
    length = flat.num_chunks // left.num_chunks
    parts: dict[int, set[int]] = {rank: set() for rank in range(world)}
    for rank in range(world):
        peers = exchange_ranks(rotation, rank, world, inner)
        mine = partners(rotation, rank, world, inner)
        assert rank in peers and list(mine.to) == sorted(mine.to)
        for part, to in enumerate(mine.to):
            # Who is sent to expects it.
            assert peers.index(rank) in partners(rotation, peers[to], world, inner).sources
            parts[peers[to]].add(part)
        # The chunks that came, put in order as the ranks that share heads have them.
        came = [flat.chunks(peers[source]) for source in mine.sources]
        in_order = [came[owner][slot] for owner, slot in map(among.owner, range(among.num_chunks))]
        place = ring_ranks(rotation, rank, world, inner).index(rank)
        wanted = [chunk * length + i for chunk in left.chunks(place) for i in range(length)]
        assert in_order == wanted
    # Each rank attends with one part of the heads, the same as all of its ring.
    for rank, of_rank in parts.items():
        assert len(of_rank) == 1
        ring = ring_ranks(rotation, rank, world, inner)
        assert all(parts[other] == of_rank for other in ring)


def test_context_first_crosses_nodes_once() -> None:
    """Fails if a ring is not inside a node, or a rank sends two parts to one node."""
    for rank in range(32):
        assert {r // 8 for r in ring_ranks("hybrid_context_first", rank, 32, 8)} == {rank // 8}
        to = partners("hybrid_context_first", rank, 32, 8).to
        assert [r // 8 for r in to] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "sharing", "copies"),
    [
        *[(8, 8, 8, 1), (8, 8, 2, 1), (32, 8, 4, 1), (32, 8, 16, 2), (8, 2, 4, 2), (8, 1, 8, 8)],
        # 12 heads of 3 kv heads over 2: six each, one and a half groups of four.
        *[(12, 3, 2, 2), (24, 6, 4, 2)],
    ],
)
def test_kv_heads_on_several_ranks(heads: int, kv_heads: int, sharing: int, copies: int) -> None:
    """Fails if a kv head travels more often than its queries are cut, or to ranks without them."""
    assert kv_copies(heads, kv_heads, sharing) == copies
    queries = heads // (kv_heads * copies)
    assert heads // sharing % queries == 0
    for head in range(heads):
        assert head // queries // copies == head // (heads // kv_heads)


def test_what_is_left() -> None:
    """Fails if heads, ranks or nodes of the ring are not those of the ranks in it."""
    shape = AttentionShape(
        seqlen=65_536,
        layout=make_layout("zigzag", 32),
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        node_size=8,
    )
    inside, outside = (shape_left(name, shape) for name in SHARE_HEADS[1:])
    assert (inside.world_size, inside.num_heads, inside.num_kv_heads) == (4, 4, 1)
    assert (inside.num_nodes, inside.tokens) == (4, 16_384)
    assert (outside.world_size, outside.num_heads, outside.num_kv_heads) == (8, 8, 1)
    assert (outside.num_nodes, outside.tokens) == (1, 8192)
    assert inside.q_bytes == outside.q_bytes == shape.q_bytes
    # 8 ranks a node for 4 kv heads: each is on two of them.
    assert inside.kv_bytes == 2 * shape.kv_bytes and outside.kv_bytes == shape.kv_bytes
    twelve = replace(shape, num_heads=12)
    assert [fits(name, twelve) for name in SHARE_HEADS] == [False, False, True]
    assert not fits("hybrid", replace(shape, node_size=None))
    with pytest.raises(ValueError, match="12 query heads do not divide over 8"):
        shape_left("hybrid", twelve)
