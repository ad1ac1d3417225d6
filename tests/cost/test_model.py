"""The cost model as a pure function: what must hold whatever the machine."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lhcp.comm.layout import Layout, LayoutName, make_layout
from lhcp.cost import choose as choosing
from lhcp.cost.calibration import BlockSize, Calibration, Host, Link, interpolate
from lhcp.cost.choose import CANDIDATES, DIRECTIONS, choose, play, predict
from lhcp.cost.clocks import Clocks, Message, Setting, finish, step_seconds
from lhcp.cost.schedules import SCHEDULES
from lhcp.cost.tables import B200, CALIBRATIONS, CPU, H200
from lhcp.cost.traffic import TRAFFIC, attention_flops, most_traffic, rotation_memory, traffic
from lhcp.ring.heads import SHARE_HEADS, shape_left
from lhcp.ring.kv import KV
from lhcp.ring.rotation import NAMES, ROTATIONS
from lhcp.ring.rotation.base import RotationContext
from lhcp.ring.schedule import allgather_steps, p2p_steps
from lhcp.ring.shape import CAUSAL, FULL, AttentionShape, Mask, Tuning
from lhcp.testing.world import world_without_messages
from lhcp.timing import UNTIMED

ZIGZAG = Layout("zigzag", 8)
BASE = AttentionShape(
    seqlen=65_536, layout=ZIGZAG, num_heads=8, num_kv_heads=8, head_dim=128, node_size=4
)


def total(rotation: str, shape: AttentionShape, calibration: Calibration = H200) -> float:
    return predict(rotation, shape, calibration).real


@pytest.mark.parametrize("rotation", NAMES)
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_times_are_bounded_by_the_twins(rotation: str, layout: LayoutName) -> None:
    """Fails if T is shorter than a twin, or longer than both in a row."""
    for calibration in CALIBRATIONS.values():
        shape = replace(BASE, layout=make_layout(layout, 8))
        prediction = predict(rotation, shape, calibration)
        for phase in (prediction.forward, prediction.backward):
            longest = max(phase.compute, phase.communication)
            assert longest <= phase.real * (1 + 1e-9)
            assert phase.real <= (phase.compute + phase.communication) * (1 + 1e-9)
            assert sum(phase.step_compute) >= phase.compute * 0.5


@pytest.mark.parametrize("rotation", NAMES)
def test_monotone_in_sizes(rotation: str) -> None:
    """Fails if a longer sequence, a larger batch or a slower link is predicted to cost less."""
    time = total(rotation, BASE)
    assert total(rotation, replace(BASE, seqlen=2 * BASE.seqlen)) > time
    assert total(rotation, replace(BASE, batch=2)) > time
    slow = replace(
        H200, inner=replace(H200.inner, bandwidth=1e9), outer=Link(latency=1e-3, bandwidth=1e9)
    )
    assert total(rotation, BASE, slow) > 2 * time
    for direction in ("forward", "backward"):
        few = most_traffic(rotation, BASE, direction)  # type: ignore[arg-type]
        many = most_traffic(rotation, replace(BASE, seqlen=2 * BASE.seqlen), direction)  # type: ignore[arg-type]
        assert many.num_bytes == 2 * few.num_bytes


@pytest.mark.parametrize("rotation", NAMES)
def test_one_rank_costs_one_device(rotation: str) -> None:
    """Fails if a rotation that moves nothing costs something."""
    alone = replace(BASE, layout=make_layout("zigzag", 1), node_size=None)
    prediction = predict(rotation, alone, H200)
    assert prediction.overhead == pytest.approx(0.0)
    assert most_traffic(rotation, alone, "backward").num_bytes == 0


@pytest.mark.parametrize("rotation", ["p2p", "allgather"])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_schedules_cover_the_triangle(rotation: str, world: int) -> None:
    """Fails if the FLOPs of all ranks' calls are not those of the whole causal attention."""
    layout = make_layout("zigzag", world)
    shape = replace(BASE, layout=layout, node_size=None, tuning=Tuning(num_head_groups=2))
    flops = 0.0
    for rank in range(world):
        steps = p2p_steps(shape, rank, True) if rotation == "p2p" else allgather_steps(shape, rank)
        for step in steps:
            heads = step.heads[1] - step.heads[0]
            for call in step.calls:
                q, kv = (side[1] - side[0] for side in (call.q, call.kv))
                if call.per_chunk:
                    blocks, q, kv = q, 1, 1
                else:
                    blocks = 1
                size = BlockSize(q * shape.chunk, kv * shape.chunk, call.mask, heads, 128)
                flops += blocks * attention_flops(size, "forward")
            assert step_seconds(step, Setting(shape, H200, "forward")) >= 0
    whole = attention_flops(BlockSize(shape.seqlen, shape.seqlen, CAUSAL, 8, 128), "forward")
    assert flops == pytest.approx(whole)


@pytest.mark.parametrize(
    "tuning",
    [
        Tuning(),
        Tuning(round_length=2, num_head_groups=4),
        Tuning(min_hidden_bytes=0, min_hiding_pairs=0),
    ],
    ids=["default", "rounds", "split"],
)
@pytest.mark.parametrize("mask", [CAUSAL, FULL], ids=str)
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_the_model_plays_the_schedule_that_runs(
    rotation: str, layout: LayoutName, mask: Mask, tuning: Tuning
) -> None:
    """Fails if a rotation's steps or their bytes are not those that the model plays."""
    world, nodes = 8, 2
    shape = AttentionShape(
        seqlen=64,
        layout=make_layout(layout, world),
        num_heads=4,
        num_kv_heads=4,
        head_dim=4,
        mask=mask,
        node_size=world // nodes if rotation == "hierarchical" else None,
        tuning=tuning,
    )
    kv = KV(*torch.zeros(2, 1, shape.tokens, 4, 4, dtype=torch.bfloat16))
    for direction in ("forward", "backward"):
        setting = Setting(shape, HAND, direction)  # type: ignore[arg-type]
        made = []
        for rank in range(world):
            with world_without_messages(rank, world, nodes if shape.num_nodes > 1 else 1) as ranks:
                context = RotationContext(ranks, shape, direction == "backward", UNTIMED)
                made.append(ROTATIONS[rotation](context, kv))
        seconds = [[step_seconds(step, setting) for step in one.steps] for one in made]
        slowest = [max(of_step) for of_step in zip(*seconds, strict=True)]
        assert play(rotation, setting).steps == slowest
        (step_bytes,) = {one.step_bytes for one in made}
        heads = [step.heads[1] - step.heads[0] for step in made[0].steps]
        largest = max(
            call.kv[1] * shape.chunk_bytes * heads[i] // 4
            for one in made
            for i, step in enumerate(one.steps)
            for call in step.calls
        )
        assert largest <= step_bytes


def test_messages_hide_behind_long_steps() -> None:
    """Fails if the schedule is not pipelined: fast links must cost next to nothing."""
    free = Link(latency=0.0, bandwidth=1e15)
    fast = replace(H200.in_graphs(), inner=free, outer=free)
    for rotation in ("p2p", "allgather", "hierarchical"):
        for phase in (
            predict(rotation, BASE, fast).forward,
            predict(rotation, BASE, fast).backward,
        ):
            assert phase.exposed < 0.01 * phase.real
    long = replace(BASE, seqlen=2**20)
    assert (
        predict("p2p", long, H200).forward.exposed < 0.02 * predict("p2p", long, H200).forward.real
    )


HAND_LINK = Link(latency=0.5, bandwidth=1.0)
HAND = Calibration(
    name="hand",
    source="these tests",
    num_heads=1,
    head_dim=1,
    square=((1, 1.0, 2.0),),
    full=((1, 1, 3.0, 6.0),),
    copy_bandwidth=1e18,
    merge_bandwidth=1e18,
    launch=0.0,
    inner=HAND_LINK,
    outer=HAND_LINK,
)
HAND_SHAPE = AttentionShape(
    seqlen=2,
    layout=Layout("contiguous", 2),
    num_heads=1,
    num_kv_heads=1,
    head_dim=1,
    element_bytes=2,
    mask=FULL,
)


def test_two_equal_steps_by_hand() -> None:
    """Fails if the ring's arithmetic changes: two ranks, no mask, a message slower than a step."""
    # kv: 2 tensors x 1 token x 2 bytes = 4 bytes: 4.5 s, the step 3 s.
    assert predict("p2p", HAND_SHAPE, HAND).forward.real == pytest.approx(4.5 + 3)
    # Gradients of the other rank's token: 4 bytes, 4.5 s, posted after the second step.
    backward = predict("p2p", HAND_SHAPE, HAND).backward
    assert backward.real == pytest.approx(6 + 6 + 4.5)
    assert backward.compute == pytest.approx(12)
    # One link carries one message at a time, and its latency beside the next one's bytes.
    assert backward.communication == pytest.approx(4.5 + 4.5)


def test_compute_that_bytes_take_by_hand() -> None:
    """Fails if messages take no compute, take it from a rank that waits, or change a twin."""
    # 4 bytes go and 4 come, each in 4 s: together they take a fifth of the compute meanwhile.
    prediction = predict("p2p", HAND_SHAPE, replace(HAND, byte_compute=0.1))
    # The first step's 3 s take 3.75, and then the rank waits for its message, as it did before.
    assert prediction.forward.real == pytest.approx(4.5 + 3)
    # The first step's 6 s: 3.2 in the message's 4, 2.8 after. Nothing computes beside the last one.
    assert prediction.backward.real == pytest.approx(4 + 2.8 + 6 + 4.5)
    assert prediction.backward.compute == pytest.approx(12)
    assert prediction.backward.communication == pytest.approx(4.5 + 4.5)
    # A gather's bytes come and go as well. Beside it the diagonal, here 6 s; then the other's keys.
    long = replace(HAND, byte_compute=0.1, square=((1, 6.0, 12.0),))
    gathered = predict("allgather", replace(HAND_SHAPE, mask=CAUSAL), long)
    assert gathered.forward.real == pytest.approx(4 + 2.8 + 3)


def test_compute_beside_messages() -> None:
    """Fails if a message's share is taken when it is not under way, not added, or not bounded."""
    assert finish(1.0, 3.0, [Message(0.0, 1.0, 0.5), Message(4.0, 9.0, 0.5)]) == 4.0
    assert finish(0.0, 3.0, [Message(1.0, 3.0, 0.5)]) == pytest.approx(1 + 2 + 1)
    assert finish(2.0, 0.25, [Message(1.0, 3.0, 0.5)]) == pytest.approx(2.5)
    both = [Message(0.0, 2.0, 0.5), Message(1.0, 3.0, 0.25)]
    assert finish(0.0, 2.0, both) == pytest.approx(3 + (2 - 0.5 - 0.25 - 0.75))
    # Two that would take more than all leave a tenth.
    assert finish(0.0, 0.1, [Message(0.0, 9.0, 0.7), Message(0.0, 9.0, 5.0)]) == pytest.approx(1.0)


@pytest.mark.parametrize("rotation", NAMES)
def test_compute_that_bytes_take(rotation: str) -> None:
    """Fails if the charge shortens a prediction or changes C, or if a tiny one does much."""
    free = replace(CPU, byte_compute=0.0)
    taken, without = (predict(rotation, BASE, calibration) for calibration in (CPU, free))
    for phase in ("forward", "backward"):
        more, less = getattr(taken, phase), getattr(without, phase)
        assert more.compute == less.compute
        assert more.real >= less.real * (1 - 1e-9)
    # Without a charge messages are not kept at all: as a charge too small to see.
    least = predict(rotation, BASE, replace(CPU, byte_compute=1e-30))
    for phase in ("forward", "backward"):
        some, none = getattr(least, phase), getattr(without, phase)
        assert some.real == pytest.approx(none.real, rel=1e-12)


def test_choice_follows_the_machine() -> None:
    """Fails if `choose` does not take the shortest prediction, or hides the others."""
    large = replace(BASE, seqlen=2**20, layout=make_layout("zigzag", 32), node_size=8)
    for shape in (BASE, large):
        for calibration in CALIBRATIONS.values():
            rotation, reason = choose(shape, calibration)
            assert choose(shape, calibration) == (rotation, reason)
            times = {r: total(r, shape, calibration) for r in CANDIDATES}
            assert times[rotation] == min(times.values())
            assert all(r in reason for r in times) and calibration.name in reason
    assert choose(replace(BASE, node_size=None), CPU, ("alltoall",))[0] == "alltoall"


def test_choosing_plays_each_candidate_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if choosing costs more than a play a candidate and direction: ranks do it at once."""
    played = []

    def counted(rotation: str, setting: Setting, **options: bool) -> Clocks:
        played.append((rotation, setting.direction, options))
        return play(rotation, setting, **options)

    monkeypatch.setattr(choosing, "play", counted)
    choose(BASE, H200)
    assert played == [(name, d, {}) for name in CANDIDATES for d in ("forward", "backward")]


def test_calibration_file(tmp_path: Path) -> None:
    """Fails if a calibration changes on disk, if an older one is refused or a wrong one is not."""
    for calibration in CALIBRATIONS.values():
        calibration.save(tmp_path / "c.json")
        assert Calibration.load(tmp_path / "c.json") == calibration
    older = {name: value for name, value in json.loads(CPU.text).items() if name != "byte_compute"}
    (tmp_path / "c.json").write_text(json.dumps(older))
    assert Calibration.load(tmp_path / "c.json") == replace(CPU, byte_compute=0.0)
    (tmp_path / "c.json").write_text('{"name": "x"}')
    with pytest.raises(ValueError, match="does not hold an lhcp calibration"):
        Calibration.load(tmp_path / "c.json")


def test_interpolation() -> None:
    """Fails if the curve misses its points, or leaves them in the wrong direction."""
    points = [(1.0, 2.0), (4.0, 4.0), (16.0, 32.0)]
    assert [interpolate(points, x) for x, _ in points] == pytest.approx([2.0, 4.0, 32.0])
    assert interpolate(points, 2.0) == pytest.approx(2 * 2**0.5)
    assert interpolate(points, 0.25) == pytest.approx(1.0)
    assert interpolate(points, 32.0) == pytest.approx(64.0)


def test_unknown_rotation() -> None:
    """Fails if a rotation that the model does not know gets a number."""
    with pytest.raises(ValueError, match="the cost model knows"):
        most_traffic("carrier pigeon", BASE, "forward")
    with pytest.raises(ValueError, match="the cost model knows"):
        choose(BASE, H200, ("carrier pigeon",))


def test_every_rotation_is_known_everywhere() -> None:
    """Fails if a rotation has a schedule and no bytes, or the other way round."""
    assert set(SCHEDULES) == set(TRAFFIC) == set(NAMES)
    assert all(rotation_memory(name, BASE) > 0 for name in NAMES)


@pytest.mark.parametrize("rotation", NAMES)
def test_narrower_keys_save_their_own_bytes(rotation: str) -> None:
    """Fails if a narrower wire changes what gradients take, or is not counted for keys."""
    half = replace(BASE, wire_bytes=1)
    for direction, less in (("forward", True), ("backward", rotation != "alltoall")):
        sent = [most_traffic(rotation, shape, direction).num_bytes for shape in (BASE, half)]  # type: ignore[arg-type]
        assert (sent[1] < sent[0]) == less
        # Keys alone are halved.
        keys_alone = direction == "forward" and rotation not in SHARE_HEADS
        assert sent[1] == sent[0] / 2 if keys_alone else sent[1] > sent[0] / 2


def test_the_host_by_hand() -> None:
    """Fails if launches are not waited for, are charged to graphs, or do not go on beside work."""
    host = Host(call=0.5, message=2.0)
    slow = replace(HAND, host=host)
    # The keys' message is posted at 2, there at 6.5; the own call is launched at 2.5 and runs 3.
    assert predict("p2p", HAND_SHAPE, slow).forward.real == pytest.approx(6.5 + 3)
    # Backward: keys at 6.5; calls 2.5 to 8.5 and 8.5 to 14.5; the parts' message 14.5 to 19.
    assert predict("p2p", HAND_SHAPE, slow).backward.real == pytest.approx(14.5 + 4.5)
    # A host that takes longer than all else is what is left: two calls and one batch; two and two.
    slower = replace(HAND, host=Host(call=50.0, message=20.0))
    assert predict("p2p", HAND_SHAPE, slower).forward.real == pytest.approx(20 + 2 * 50 + 3)
    assert predict("p2p", HAND_SHAPE, slower).forward.compute == pytest.approx(2 * 50 + 3)
    in_graphs = predict("p2p", HAND_SHAPE, slow.in_graphs())
    assert in_graphs.real == predict("p2p", HAND_SHAPE, HAND).real
    assert slow.in_graphs().name == "hand, graphs"


def test_nics_by_hand() -> None:
    """Fails if ranks of a node that are more than its NICs do not share them, or fewer gain."""
    assert [replace(HAND, nics=n).across(4).bandwidth for n in (1, 2, 4, 8)] == [0.25, 0.5, 1, 1]
    assert HAND.across(4) == replace(HAND, nics=2).across(None) == HAND.outer
    narrow = replace(H200, nics=2)
    for rotation in ("p2p", "allgather", "hierarchical", "hybrid", "hybrid_context_first"):
        all_of_them, two = (total(rotation, BASE, table) for table in (H200, narrow))
        assert two > all_of_them
    # Inside a node nobody asks a NIC.
    alone = replace(BASE, node_size=None)
    assert total("p2p", alone, narrow) == total("p2p", alone, H200)


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
