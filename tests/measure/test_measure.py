"""`measure_overhead` on real ranks: its report, its agreement, its arithmetic."""

import json
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from lhcp.measure import OverheadReport, PhaseReport, Timing, measure_overhead
from lhcp.measure.runs import Recorder, Runner, take_sample
from lhcp.testing.inputs import small_config
from lhcp.testing.ranks import RankError, RankPool


def measure(group: dist.ProcessGroup | None, lighthouse: bool, rotation: str) -> str:
    config, seqlen = small_config(num_strata=8) if lighthouse else (None, 2048)
    report = measure_overhead(
        config,
        seqlen=seqlen,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        dtype=torch.float32,
        group=group,
        rotation=rotation,
        repeats=3,
        single_seconds=60.0 if lighthouse else 0.0,
        progress=False,
    )
    assert OverheadReport.from_json(report.to_json()) == report
    return report.to_json()


@pytest.mark.parametrize(
    ("lighthouse", "rotation", "world"),
    [(True, "p2p", 2), (False, "allgather", 4), (True, "alltoall", 2)],
)
def test_report(ranks: RankPool, lighthouse: bool, rotation: str, world: int) -> None:
    """Fails if ranks differ in the report, or if a part of it is missing or has no value."""
    texts = ranks.run(measure, world, lighthouse, rotation)
    assert len(set(texts)) == 1
    report = OverheadReport.from_json(texts[0])
    assert report.setting["rotation"] == rotation
    for phase in (*report.phases, *report.layer):
        for timing in (phase.real, phase.compute, phase.communication, phase.single):
            assert timing is not None and 0 < timing.low <= timing.median <= timing.high
        assert phase.bytes_per_rank and phase.gigabytes_per_second
    forward, backward, both = (phase.bytes_per_rank for phase in report.phases)
    assert both == (forward or 0) + (backward or 0)
    assert len(report.layer) == (3 if lighthouse else 0)
    # With no time for T1 the first length that is tried is the last one.
    assert report.extrapolated == (not lighthouse)
    assert {mark.rank for mark in report.timeline} == set(range(world))
    assert {mark.variant for mark in report.timeline} == {"real", "communication"}
    stages = {step.stage for step in report.steps}
    assert {"ring_forward", "ring_backward"} <= stages
    if lighthouse:
        assert {"pool", "select", "gather", "scatter", "boundary"} <= stages
    assert rotation in report.table() and "backward" in report.table()
    assert len(str(report).splitlines()) <= 3 and "Mark(" not in repr(report)


def test_one_rank() -> None:
    """Fails if one rank, which needs no rotation, cannot be measured."""
    report = OverheadReport.from_json(measure(None, True, "auto"))
    assert report.phase("both").bytes_per_rank == 0
    assert report.phase("both").gigabytes_per_second is None


def disagree(group: dist.ProcessGroup) -> None:
    seqlen = 128 if group.rank() == 0 else 256
    measure_overhead(
        None, seqlen=seqlen, num_heads=1, head_dim=8, dtype=torch.float32, group=group, repeats=1
    )


def too_many_heads(group: dist.ProcessGroup) -> None:
    measure_overhead(
        None,
        seqlen=128,
        num_heads=3,
        head_dim=8,
        dtype=torch.float32,
        group=group,
        rotation="alltoall",
    )


def heads_that_do_not_divide(group: dist.ProcessGroup) -> None:
    measure_overhead(
        None, seqlen=128, num_heads=3, num_kv_heads=2, head_dim=8, dtype=torch.float32, group=group
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (heads_that_do_not_divide, "the 3 query heads must be a multiple of the 2 kv heads"),
        (disagree, "asked for different things: seqlen"),
        (too_many_heads, "3 query heads do not divide"),
    ],
)
def test_errors_on_every_rank(ranks: RankPool, wrong: object, message: str) -> None:
    """Fails if a bad call hangs, or is an error on one rank only."""
    with pytest.raises(RankError, match=message) as caught:
        ranks.run(wrong, 2)  # type: ignore[arg-type]
    assert str(caught.value).count(message) >= 2


def test_derived_numbers() -> None:
    """Fails if overhead, exposed, overlap, contention or the rate are not what they are called."""
    phase = PhaseReport(
        phase="both",
        real=Timing.of([3.0]),
        compute=Timing.of([2.5]),
        communication=Timing.of([1.0]),
        single=Timing.of([10.0]),
        waited=0.3,
        bytes_per_rank=2_000_000_000,
        world_size=4,
    )
    assert phase.overhead == pytest.approx(0.2)
    assert phase.exposed == pytest.approx(0.5)
    assert phase.overlap == pytest.approx(0.5)
    assert phase.contention == pytest.approx(0.2)
    assert phase.gigabytes_per_second == pytest.approx(2.0)
    silent = replace(phase, communication=Timing.of([0.0]), single=None, waited=None)
    assert silent.overlap is silent.overhead is silent.contention is None


def test_a_host_that_sets_the_pace_is_said() -> None:
    """Fails if a host-bound run reads as one that its messages slow, or the other way round."""
    phase = PhaseReport(
        phase="both",
        real=Timing.of([5.6e-3]),
        compute=Timing.of([5.0e-3]),
        communication=Timing.of([1.0e-3]),
        single=None,
        waited=None,
        bytes_per_rank=None,
        world_size=2,
        host=5.5e-3,
    )
    report = OverheadReport(
        setting=dict.fromkeys(
            (
                *("rotation", "layout", "batch", "num_heads", "num_kv_heads", "head_dim"),
                *("dtype", "backend", "device", "repeats", "calls", "world_size"),
            ),
            1,
        )
        | {"subsequence": 64, "seqlen": 64},
        phases=(phase,) * 3,
        layer=(replace(phase, host=2e-3),) * 3,
        steps=(),
        timeline=(),
        single_seqlen=64,
    )
    text = report.table()
    assert text.count("The host sets the pace: ms to launch both 5.500") == 1
    assert "lhcp.graphed(model)" in text
    again = OverheadReport.from_json(report.to_json())
    assert again == report and again.phases[0].host_sets_the_pace
    assert not again.layer[0].host_sets_the_pace
    # One of before has no host.
    old = json.loads(report.to_json())
    for row in (*old["phases"], *old["layer"]):
        del row["host"]
    assert OverheadReport.from_json(json.dumps(old)).phases[0].host is None


def test_the_host_is_timed_at_the_first_call() -> None:
    """Fails if a host that waits for a full queue counts as one that is slow."""
    spans = Recorder(torch.device("cpu"))
    assert take_sample(Runner(lambda: None, lambda: None), "both", spans, 1).host is None
    spans.launches = True
    calls: list[float] = []

    def slower() -> None:
        time.sleep(0.02 if calls else 0.0)
        calls.append(0.0)

    sample = take_sample(Runner(slower, lambda: None), "both", spans, 3)
    assert sample.host is not None and sample.host < 0.02 <= sample.seconds * 3 / 2


def test_quartiles() -> None:
    """Fails if a timing is not the median and the quartiles."""
    assert Timing.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Timing(3.0, 2.0, 4.0)
    assert Timing.of([1.0, 2.0]) == Timing(1.5, 1.25, 1.75)


def test_recorder_places_spans() -> None:
    """Fails if a span lies outside its measurement or calls in a row are not divided."""
    spans = Recorder(torch.device("cpu"))

    def step() -> None:
        with spans.span("ring_forward", "compute", 0, torch.device("cpu")):
            torch.randn(1000).sum()

    sample = take_sample(Runner(step, step), "both", spans, 3)
    assert len(sample.spans) == 6 and len(sample.first_call) == 2
    stops = [0.0, *(stop for *_, stop in sample.spans)]
    starts = [start for *_, start, _ in sample.spans]
    assert all(start >= stop for start, stop in zip(starts, stops, strict=False))
    assert stops[-1] <= 3 * sample.seconds
