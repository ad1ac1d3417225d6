"""From every rank's samples to a report: the slowest rank of each repeat, then the median."""

import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch

from lhcp.cost.traffic import boundary_bytes, most_traffic
from lhcp.measure.report import OverheadReport
from lhcp.measure.runs import Job, Sample
from lhcp.measure.timings import PHASES, Mark, PhaseReport, StepReport, Timing, half_width
from lhcp.timing import uncovered

Samples = dict[tuple[str, str], list[Sample]]
"""(run, phase) -> one sample a repeat, on one rank."""


def summarize(
    job: Job, by_rank: Sequence[Samples], single_seqlen: int, repeats: int, calls: int
) -> OverheadReport:
    """Make the report.

    Args:
        by_rank: all ranks' samples; those of one device alone are rank 0's.
        single_seqlen: tokens of T1's run.
    """
    factor = (job.entries / single_seqlen) ** 2
    measured = [phase for phase in PHASES if ("real", phase) in by_rank[0]]
    names = RunNames("real", "compute", "communication", "single")
    phases = tuple(_phase(phase, names, by_rank, factor, _bytes(job, phase)) for phase in measured)
    layer: tuple[PhaseReport, ...] = ()
    if job.config is not None:
        names = RunNames("layer", "layer_compute", "layer_communication", "layer_single")
        layer = tuple(
            _phase(phase, names, by_rank, 1.0, _bytes(job, phase, layer=True)) for phase in measured
        )
    return OverheadReport(
        setting=_setting(job, repeats, calls),
        phases=phases,
        layer=layer,
        steps=tuple(_steps(by_rank)),
        timeline=tuple(_timeline(by_rank)),
        single_seqlen=single_seqlen,
    )


def _bytes(job: Job, phase: str, layer: bool = False) -> int | None:
    """Return what a rank sends at most, or None where the cost model does not know it."""
    total, shape = 0, job.plan.shape
    for direction in ("forward", "backward"):
        if phase not in (direction, "both"):
            continue
        try:
            total += most_traffic(job.plan.rotation, shape, direction).num_bytes
        except ValueError:
            return None
        if layer and job.config is not None:
            total += boundary_bytes(shape, job.config.num_levels)
    return total


def _slowest(by_rank: Sequence[Samples], name: str, phase: str) -> list[float]:
    """Return the seconds of the slowest rank, repeat by repeat."""
    repeats = zip(*(samples[name, phase] for samples in by_rank), strict=True)
    return [max(sample.seconds for sample in repeat) for repeat in repeats]


def _host(by_rank: Sequence[Samples], name: str, phase: str) -> float | None:
    """Return the median over repeats of the slowest host's launches; None without any."""
    repeats = zip(*(samples[name, phase] for samples in by_rank), strict=True)
    slowest = [max((s.host for s in r if s.host is not None), default=None) for r in repeats]
    found = [host for host in slowest if host is not None]
    return Timing.of(found).median if found else None


class RunNames(NamedTuple):
    """What the runs of one report are called in the samples."""

    real: str
    compute: str
    communication: str
    single: str


def _phase(
    phase: str,
    names: RunNames,
    by_rank: Sequence[Samples],
    factor: float,
    num_bytes: int | None,
) -> PhaseReport:
    alone = by_rank[0].get((names.single, phase))
    waits = []
    for repeat in zip(*(samples[names.real, phase] for samples in by_rank), strict=True):
        sample = max(repeat, key=lambda s: s.seconds)
        found: dict[str, list[tuple[float, float]]] = {"wait": [], "compute": []}
        for _, kind, _, start, stop in sample.spans:
            found.setdefault(kind, []).append((start, stop))
        if found["wait"]:
            waits.append(uncovered(found["wait"], found["compute"]) / sample.calls)
    waited = Timing.of(waits).median if waits else None
    real, compute, communication = (_slowest(by_rank, name, phase) for name in names[:3])
    single = None if alone is None else [s.seconds * factor for s in alone]
    # Of pairs of one repeat: what slows both of them is no difference.
    exposed = [t - c for t, c in zip(real, compute, strict=True)]
    over = None if single is None else [t / s for t, s in zip(real, single, strict=True)]
    over_error = None if over is None else half_width(over)
    return PhaseReport(
        phase=phase,
        real=Timing.of(real),
        compute=Timing.of(compute),
        communication=Timing.of(communication),
        single=None if single is None else Timing.of(single),
        waited=waited,
        host=_host(by_rank, names.real, phase),
        bytes_per_rank=num_bytes,
        world_size=len(by_rank),
        exposed_error=half_width(exposed),
        overhead_error=None if over_error is None else len(by_rank) * over_error,
    )


def _steps(by_rank: Sequence[Samples]) -> Iterator[StepReport]:
    directions = any(phase == "forward" for _, phase in by_rank[0])
    for name, phase in by_rank[0]:
        if "single" in name or (directions and phase == "both"):
            continue
        repeats: dict[tuple[str, str, int], list[float]] = {}
        for repeat in zip(*(samples[name, phase] for samples in by_rank), strict=True):
            worst: dict[tuple[str, str, int], float] = {}
            for sample in repeat:
                for key, seconds in _totals(sample).items():
                    worst[key] = max(worst.get(key, 0.0), seconds)
            for key, seconds in worst.items():
                repeats.setdefault(key, []).append(seconds)
        for (stage, kind, step), measured in repeats.items():
            yield StepReport(name, phase, stage, kind, step, Timing.of(measured))


def _totals(sample: Sample) -> dict[tuple[str, str, int], float]:
    """Return seconds by step, of one call."""
    totals: dict[tuple[str, str, int], float] = {}
    for stage, kind, step, start, stop in sample.spans:
        key = (stage, kind, step)
        totals[key] = totals.get(key, 0.0) + (stop - start) / sample.calls
    return totals


def _timeline(by_rank: Sequence[Samples]) -> Iterator[Mark]:
    seconds = _slowest(by_rank, "real", "both")
    middle = sorted(range(len(seconds)), key=lambda i: seconds[i])[len(seconds) // 2]
    for rank, samples in enumerate(by_rank):
        for name in ("real", "communication"):
            for stage, kind, step, start, stop in samples[name, "both"][middle].first_call:
                yield Mark(rank, name, stage, kind, step, start, stop)


def _setting(job: Job, repeats: int, calls: int) -> dict[str, Any]:
    cuda = job.device.type == "cuda"
    return {
        "seqlen": job.tokens,
        "subsequence": job.entries,
        "world_size": job.plan.ranks.world_size,
        "batch": job.batch,
        "num_heads": job.heads[0],
        "num_kv_heads": job.heads[1],
        "head_dim": job.head_dim,
        "dtype": str(job.dtype).removeprefix("torch."),
        "layout": job.plan.layout.name,
        "rotation": job.plan.rotation,
        "backend": job.plan.backend,
        "config": None if job.config is None else asdict(job.config),
        "repeats": repeats,
        "calls": calls,
        "device": torch.cuda.get_device_name(job.device) if cuda else platform.machine() + " cpu",
        "torch": torch.__version__,
    }
