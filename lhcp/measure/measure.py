"""The measurement: rounds of runs on all ranks, and their summary."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from lhcp.checks import check_qkv
from lhcp.comm.agreement import compared
from lhcp.comm.layout import LayoutName, make_layout
from lhcp.comm.mesh import Group, Ranks, as_ranks
from lhcp.config import LighthouseConfig
from lhcp.cost.calibration import Calibration
from lhcp.layer.choices import PACKAGE_RINGS, Choices, by_name
from lhcp.layer.plan import make_plan
from lhcp.layer.select import local_geometry
from lhcp.measure.effort import LEAST, Effort, Progress, rounds, too_long
from lhcp.measure.rank_values import barrier, gathered, slowest
from lhcp.measure.report import OverheadReport
from lhcp.measure.runs import Job, Recorder, Runner, filled, single, single_layer, take_sample
from lhcp.measure.summary import Samples, summarize
from lhcp.measure.twins import RandomReceiveBuffers, silent
from lhcp.ring.rotation import names

_SAMPLE_SECONDS = 0.1
"""Calls in a row on a GPU last at least this long: the first waits for the host to launch it, which
in a program that runs on happens while the GPU is busy."""


def measure_overhead(
    config: LighthouseConfig | None,
    *,
    seqlen: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    head_dim: int = 128,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    group: Group | Ranks = None,
    layout: LayoutName = "zigzag",
    rotation: str | Calibration = "auto",
    backend: str = "auto",
    kernels: str = "auto",
    device: torch.device | str | None = None,
    budget: float = 30.0,
    repeats: int | None = None,
    warmup: int = 1,
    calls: int | None = None,
    single_seconds: float | None = None,
    progress: bool = True,
) -> OverheadReport:
    """Measure what the rotation costs on these ranks, with random inputs and no documents.

    A collective: every rank of the group must call it with equal arguments. `print` the result for
    a sentence and what to change; its `table()` has the numbers.

    Args:
        config: of the lighthouse layer: the attention over its sub-sequence is measured, and the
            layer by stages. None: dense attention over `seqlen` tokens.
        seqlen: N, tokens of the whole sequence.
        num_heads, num_kv_heads, head_dim, batch, dtype: of q, k, v; num_kv_heads None: num_heads.
        group, layout, rotation, backend, kernels: as in `lhcp.lighthouse_attention`. Name the
            rotation if you train on documents, with which "auto" may take another.
        device: None: the current GPU if the group communicates by NCCL (or there is no group and
            there is a GPU), else the CPU.
        budget: seconds that it may take. Where they are few, forward and backward are measured in
            one go alone, and three repeats are taken in any case.
        repeats: measurements of each run, in place of a budget; warmup: unmeasured ones before.
        calls: runs in a row that one measurement times; None: as many as last 20 ms on a GPU, one
            on a CPU.
        single_seconds: the longest that T1 may take, forward and backward; None: a fifteenth of
            the budget, or 10. It is measured at the largest S / 2^i that keeps to this (and fits
            in memory) and scaled by pairs of tokens.
        progress: whether rank 0 says on stderr how far it is.

    Returns:
        OverheadReport, the same on every rank.

    Raises:
        TypeError, ValueError, ImportError: as `lhcp.lighthouse_attention`, on every rank.
    """
    ranks = as_ranks(group, two_axes=by_name(rotation))

    def make() -> tuple[Job, Effort]:
        effort = Effort(budget, repeats, warmup, calls, single_seconds)
        heads = (num_heads, num_heads if num_kv_heads is None else num_kv_heads)
        where = _device(ranks, device)
        entries = seqlen if config is None else config.subsequence_length(seqlen)
        # Of one token: what is wrong with the sizes is said before anything runs.
        like = torch.empty((batch, 1, heads[0], head_dim), dtype=dtype, device=where)
        keys = torch.empty((batch, 1, heads[1], head_dim), dtype=dtype, device=where)
        check_qkv(like, keys, keys)
        make_layout(layout, ranks.world_size).check_seqlen(entries)
        choices = Choices(layout, rotation, backend, kernels)
        local = entries // ranks.world_size
        plan = make_plan(like, keys, ranks, choices, tokens=local)
        if plan.rotation in PACKAGE_RINGS:
            raise ValueError(
                f"rotation={plan.rotation!r}: a package's ring has no twins to measure it against; "
                f"those that have: {', '.join(names())}"
            )
        if config is not None:
            local_geometry(config, seqlen // ranks.world_size, ranks, layout)
        job = Job(
            config=config,
            tokens=seqlen,
            entries=entries,
            heads=heads,
            head_dim=head_dim,
            batch=batch,
            dtype=dtype,
            device=where,
            plan=plan,
            kernels=kernels,
        )
        return job, effort

    named = rotation if isinstance(rotation, str) else rotation.name
    asked = {
        "call": "measure_overhead",
        "config": config,
        "seqlen": seqlen,
        "heads": (num_heads, num_kv_heads, head_dim),
        "batch": batch,
        "dtype": dtype,
        "choices": (layout, named, backend, kernels),
        "effort": (budget, repeats, warmup, calls),
    }
    fields = {name: str(value) for name, value in asked.items()}
    job, effort = compared(ranks, make, lambda _: fields)
    spans = Recorder(job.device)
    buffers = RandomReceiveBuffers()
    with silent(ranks, buffers) as quiet:
        runs = _runs(job, spans, quiet, buffers)
        told = Progress(progress and ranks.rank == 0)
        return _measure(job, spans, runs, effort, told)


def _runs(
    job: Job, spans: Recorder, quiet: Ranks, buffers: RandomReceiveBuffers
) -> dict[str, Runner]:
    """Return what takes turns on all ranks, by name."""
    plan, local = job.plan, job.plan.shape.tokens
    runs = {
        "real": job.attention(plan, spans, local),
        "compute": filled(job.attention(replace(plan, ranks=quiet), spans, local), buffers),
        "communication": job.messages(spans),
    }
    if job.config is not None:
        tokens = job.tokens // plan.ranks.world_size
        runs["layer"] = job.layer(plan.ranks, spans, tokens)
        runs["layer_compute"] = filled(job.layer(quiet, spans, tokens), buffers)
        runs["layer_communication"] = job.messages(spans, layer=True)
    return runs


def _measure(
    job: Job, spans: Recorder, runs: dict[str, Runner], effort: Effort, told: Progress
) -> OverheadReport:
    ranks = job.plan.ranks
    told.say(f"{job.entries:,} entries on {ranks.world_size} ranks, first runs")
    seconds = _seconds(job, runs["real"], spans)
    calls = effort.calls or _calls(job, seconds)
    # The others send alone, which takes little of it.
    attending = [name for name in runs if not name.endswith("communication")]
    if said := too_long(effort, told.spent, seconds, len(attending)):
        told.say(said)
    alone: dict[str, Runner] = {}
    single_seqlen = 0
    if ranks.rank == 0:
        alone["single"], single_seqlen = single(job, effort.single_limit)
        if job.config is not None and single_seqlen == job.entries:
            alone |= single_layer(job)

    def round_of(phases: Sequence[str]) -> Samples:
        found: Samples = {}
        for phase in phases:
            for name, runner in (runs | alone).items():
                if name in runs:
                    barrier(ranks, job.device)
                found[name, phase] = [take_sample(runner, phase, spans, calls)]
        return found

    if job.device.type == "cuda":
        # Triton compiles in the first calls: a round that holds that would be planned by.
        round_of(("both",))
    barrier(ranks, job.device)
    before = told.spent
    first = round_of(("both",))
    spent = slowest(told.spent, ranks)
    planned = rounds(effort, spent, slowest(told.spent - before, ranks))
    told.say(f"{spent:.0f} s so far; {planned}")
    if effort.repeats is not None:
        for _ in range(effort.warmup):
            round_of(planned.phases)
    samples: Samples = first if planned.keep_first else {}
    done = int(planned.keep_first)
    while done < planned.repeats:
        for key, sample in round_of(planned.phases).items():
            samples.setdefault(key, []).extend(sample)
        done += 1
        told.at(f"{done} of {planned.repeats} rounds")
        late = effort.repeats is None and done >= LEAST and told.spent > effort.budget
        if any(gathered(late, ranks)):
            break
    everybody = gathered((samples, single_seqlen), ranks)
    return summarize(job, [samples for samples, _ in everybody], everybody[0][1], done, calls)


def _device(ranks: Ranks, device: torch.device | str | None) -> torch.device:
    if device is not None:
        where = torch.device(device)
    elif ranks.flat is None:
        where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        where = torch.device("cuda" if "nccl" in dist.get_backend_config(ranks.flat) else "cpu")
    if where.type == "cuda" and where.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return where


def _seconds(job: Job, runner: Runner, spans: Recorder) -> float:
    """Return what one forward and backward takes, the slowest rank's."""
    # On a GPU the first run compiles and allocates.
    for _ in range(2 if job.device.type == "cuda" else 1):
        barrier(job.plan.ranks, job.device)
        seconds = take_sample(runner, "both", spans, 1).seconds
    return slowest(seconds, job.plan.ranks)


def _calls(job: Job, seconds: float) -> int:
    """Return how many calls in a row last long enough."""
    if job.device.type != "cuda":
        return 1
    return min(100, math.ceil(_SAMPLE_SECONDS / seconds))
