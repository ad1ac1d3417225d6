"""Spans: every stage and step is named and timed, and timing changes nothing."""

import time
from typing import Any

import pytest
import torch

import lhcp
from lhcp.testing.inputs import qkv, small_config
from lhcp.testing.ranks import RankPool
from lhcp.timing import Span, uncovered

STAGES = ("pool", "select", "gather", "scatter")


def one_layer(group: Any, rotation: str) -> tuple[list[Span], bool]:
    """Run a layer with and without timers; return its spans, and whether the bits are equal."""
    config, seqlen = small_config(num_strata=12)
    whole = qkv(seqlen, dtype=torch.float32)
    q, k, v, do = (lhcp.shard(x, group) for x in whole)
    timers = lhcp.Timers()

    def run(given: lhcp.Timers | None) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        layer = lhcp.LighthouseAttention(config, group, rotation=rotation, timers=given)
        o = layer(*leaves)
        return [o.detach(), *torch.autograd.grad(o, leaves, do)]

    plain = run(None)
    begin = time.perf_counter()
    measured = run(timers)
    seconds = time.perf_counter() - begin
    same = all(torch.equal(a, b) for a, b in zip(plain, measured, strict=True))
    assert 0 <= timers.rotation_share(seconds) <= 1
    spans = timers.spans()
    timers.reset()
    assert not timers.spans()
    return spans, same


@pytest.mark.parametrize("rotation", ["p2p", "allgather"])
def test_every_stage_and_step_is_there(ranks: RankPool, rotation: str) -> None:
    """Fails if a stage loses its span, or if timers change a bit of the result."""
    for spans, same in ranks.run(one_layer, 3, rotation):
        assert same
        names = {(span.stage, span.kind) for span in spans}
        assert {(stage, "compute") for stage in STAGES} <= names
        for stage in ("ring_forward", "ring_backward"):
            steps = [s.step for s in spans if (s.stage, s.kind) == (stage, "compute")]
            assert sorted(set(steps)) == list(range(3 if rotation == "p2p" else 2))
            assert (stage, "wait") in names
        assert {("boundary", "wait"), ("boundary_backward", "wait")} <= names
        assert all(span.seconds >= 0 for span in spans)


def test_only_waiting_beside_no_work_is_lost() -> None:
    """Fails if work on other streams is not taken off, or overlapping spans count twice."""
    waits = [(0.0, 4.0), (3.0, 5.0), (8.0, 9.0)]
    assert uncovered(waits, []) == pytest.approx(6.0)
    assert uncovered(waits, [(1.0, 2.0), (1.5, 3.5), (8.0, 9.0)]) == pytest.approx(2.5)
    assert uncovered([], [(0.0, 1.0)]) == 0


@pytest.mark.parametrize("rotation", ["p2p", "allgather"])
def test_waiting_for_a_late_rank_is_rotation_time(ranks: RankPool, rotation: str) -> None:
    """Fails if a wait is outside of its span: the ranks on time wait, the late one does not."""
    late = 1.0
    on_time, too_late = ranks.run(one_ring, 2, rotation, late)
    assert on_time > 0.8 * late > too_late


def one_ring(group: Any, rotation: str, late: float) -> float:
    """Seconds that this rank waits in the ring when the last one is late."""
    q, k, v, _ = (lhcp.shard(x, group) for x in qkv(256, dtype=torch.float32))
    timers = lhcp.Timers()
    lhcp.ring_attention(q, k, v, group=group, rotation=rotation)
    torch.distributed.barrier(group)
    if group.rank() == group.size() - 1:
        time.sleep(late)
    lhcp.ring_attention(q, k, v, group=group, rotation=rotation, timers=timers)
    return timers.waited("ring_forward")


def test_ranges_are_named_in_a_profile() -> None:
    """Fails if a profile shows a stage only as its kernels."""
    config, seqlen = small_config()
    q, k, v, do = qkv(seqlen, dtype=torch.float32)
    q.requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        lhcp.lighthouse_attention(q, k, v, config=config).backward(do)
    names = {event.key for event in profile.key_averages()}
    wanted = {f"lhcp::{stage}::compute[0]" for stage in (*STAGES, "ring_forward", "ring_backward")}
    assert wanted <= names
