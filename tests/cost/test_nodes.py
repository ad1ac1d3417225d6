"""What crosses nodes, and by whose NIC."""

from dataclasses import replace

import pytest

from lhcp.comm.layout import Layout, make_layout
from lhcp.cost.calibration import Link
from lhcp.cost.choose import DIRECTIONS, choose, play
from lhcp.cost.clocks import Clocks, Setting
from lhcp.cost.tables import B200, H200
from lhcp.cost.traffic import most_traffic, traffic
from lhcp.ring.heads import shape_left
from tests.cost.shapes import BASE, HAND, HAND_LINK, HAND_SHAPE, total


def test_all_to_alls_cross_nodes_by_each_ranks_nic() -> None:
    """Fails if parts for other nodes are shared out over NICs as a ring's bytes are."""
    shape = replace(HAND_SHAPE, seqlen=8, layout=Layout("contiguous", 8), node_size=4)
    setting = Setting(shape, HAND, "forward")
    clocks = Clocks(setting, compute=True, communicate=True)
    # 7 bytes, one for each other rank: four of them across, by one NIC. HAND has no hops: 7 x 0.5.
    assert clocks.all_to_all([7.0], [range(8)]) == [7.0 + 3.5] * 8
    quick = setting._replace(calibration=replace(HAND, inner=replace(HAND_LINK, bandwidth=1e9)))
    across = Clocks(quick, compute=True, communicate=True)
    assert across.all_to_all([7.0], [range(8)]) == pytest.approx([4.0 + 3.5] * 8)
    gathered = Clocks(quick, compute=True, communicate=True)
    assert gathered.gather(1.0, [range(8)]) == pytest.approx([7 / 4 + 3.5] * 8)


def test_collectives_take_what_they_do_on_the_link_that_they_use() -> None:
    """Fails if what a gather takes inside a node is charged across, or the other way round."""
    shape = replace(HAND_SHAPE, seqlen=8, layout=Layout("contiguous", 8), node_size=4)
    inner = replace(HAND_LINK, bandwidth=1e9, gather_factor=100.0, alltoall_factor=100.0)
    outer = replace(HAND_LINK, gather_factor=2.0, alltoall_factor=3.0)
    setting = Setting(shape, replace(HAND, inner=inner, outer=outer), "forward")
    across, inside = (Clocks(setting, compute=True, communicate=True) for _ in range(2))
    assert across.all_to_all([7.0], [range(8)]) == pytest.approx([3 * 4.0 + 3.5] * 8)
    nodes = [range(4), range(4, 8)]
    assert inside.all_to_all([3e7] * 2, nodes) == pytest.approx([3.0 + 1.5] * 8)
    gathered = Clocks(setting, compute=True, communicate=True)
    assert gathered.gather(1.0, [range(8)]) == pytest.approx([2 * 7 / 4 + 3.5] * 8)


def test_hybrid_is_the_ring_of_what_is_left_between_exchanges() -> None:
    """Fails if the ring is not played as p2p of fewer ranks, or an exchange is left out."""
    free = Link(latency=0.0, bandwidth=1e30)
    table = replace(H200.in_graphs(), inner=free, copy_bandwidth=1e30, launch=0.0, nics=None)
    shape = replace(BASE, layout=make_layout("zigzag", 16), node_size=4)
    left = shape_left("hybrid", shape)
    for direction in ("forward", "backward"):
        hybrid, ring = (
            play(name, Setting(one, table, direction)).seconds  # type: ignore[arg-type]
            for name, one in (("hybrid", shape), ("p2p", left))
        )
        assert hybrid == pytest.approx(ring)
    # Exchanges hide behind nothing: 1 GB/s inside the node adds their bytes to the time.
    slow = replace(table, inner=Link(latency=0.0, bandwidth=1e9))
    inside = [
        sent.num_bytes - sent.across_bytes
        for sent in (most_traffic("hybrid", shape, d) for d in DIRECTIONS)
    ]
    more = total("hybrid", shape, slow) - total("hybrid", shape, table)
    assert more == pytest.approx(sum(inside) / 1e9)


def test_what_the_model_says_of_four_nodes() -> None:
    """Fails if sharing heads is no longer predicted to win on 32 ranks of four nodes."""
    layout = make_layout("zigzag", 32)
    short = replace(BASE, layout=layout, node_size=8)
    assert choose(short, B200.in_graphs())[0] == "hybrid_context_first"
    assert choose(replace(short, seqlen=2**20), B200.in_graphs())[0] == "hybrid"
    # 12 heads divide over four nodes and not over eight ranks.
    twelve = choose(replace(short, num_heads=12, num_kv_heads=12), B200.in_graphs())
    assert twelve[0] == "hybrid_context_first" and "hybrid " not in twelve[1]


def test_every_nic_carries_a_part_of_its_own() -> None:
    """Fails if bytes cross nodes twice, or some NICs carry what others leave."""
    shape = replace(BASE, layout=make_layout("zigzag", 32), node_size=8)
    for direction, back in (("forward", 0), ("backward", 1)):
        sent = [traffic("hierarchical", shape, direction, r) for r in range(32)]  # type: ignore[arg-type]
        # Each rank passes each other node's shard of its index on once; sums come back wide.
        across = 3 * shape.kv_bytes + back * 3 * shape.kv_sum_bytes
        assert {one.across_bytes for one in sent} == {across}
        hybrid = [traffic("hybrid", shape, direction, r).across_bytes for r in range(32)]  # type: ignore[arg-type]
        for node in range(4):
            assert len(set(hybrid[node * 8 : node * 8 + 8])) == 1
    # Head first, by hand: a node gives 2 of 8 chunks of keys to those nodes that see them, at most
    # 6 times together; each NIC an eighth of the heads of it.
    keys = [traffic("hybrid", shape, "forward", r).across_bytes for r in range(32)]
    assert max(keys) == 6 * (32 * shape.kv_bytes // 8) // 8
    # Context first: of q, k and v three of four parts; of the output all of them, to one node.
    for rank in range(32):
        node, place = divmod(rank, 8)
        own = place * 4 // 8 == node
        back = 0 if own else shape.q_bytes
        sent = traffic("hybrid_context_first", shape, "forward", rank).across_bytes
        assert sent == (shape.q_bytes + shape.kv_bytes) * 3 // 4 + back
