"""The cost model as a pure function: what must hold whatever the machine."""

from dataclasses import replace

import pytest
import torch

from lhcp.comm.layout import LayoutName, make_layout
from lhcp.cost.calibration import BlockSize, Link
from lhcp.cost.choose import play, predict
from lhcp.cost.clocks import Setting, step_seconds
from lhcp.cost.tables import CALIBRATIONS, CPU, H200
from lhcp.cost.traffic import attention_flops, most_traffic
from lhcp.ring.heads import SHARE_HEADS
from lhcp.ring.kv import KV
from lhcp.ring.rotation import NAMES, ROTATIONS
from lhcp.ring.rotation.base import RotationContext
from lhcp.ring.schedule import allgather_steps, p2p_steps
from lhcp.ring.shape import CAUSAL, FULL, AttentionShape, Mask, Tuning
from lhcp.testing.world import world_without_messages
from lhcp.timing import UNTIMED
from tests.cost.shapes import BASE, HAND, total


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
@pytest.mark.parametrize("mask", [CAUSAL, FULL, Mask(True, 2, 2, 1)], ids=str)
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
