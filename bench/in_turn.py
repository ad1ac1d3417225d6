"""All ranks in turn on one device, without messages: what the rotation's compute alone costs.

Each rank runs its own schedule in a world of ranks that send nothing, beside the fastest kernel
on the whole, one after the other in every repeat. Instead of what others would have sent, a rank
gets copies of its own, so that kernels meet real numbers (zeros draw less power and run faster);
the copying is timed and taken off. Rotations are checked on gloo ranks in float64 first, kernels on
this device against float64.
"""

import argparse
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from harness import gate
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from lhcp.config import LighthouseConfig
from lhcp.layout import make_layout
from lhcp.mesh import Ranks, as_ranks
from lhcp.overhead.report import PHASES
from lhcp.overhead.runs import Job, Recorder, Runner, take
from lhcp.ring.block import BLOCKS
from lhcp.ring.function import make_plan
from lhcp.ring.rotation import messages
from lhcp.testing.ranks import RankPool
from lhcp.testing.tolerance import assert_within_budget

Times = dict[str, dict[str, list[float]]]
"""Run -> phase -> seconds, one a repeat."""


@contextmanager
def world_without_messages(rank: int, world_size: int, nodes: int) -> Iterator[Ranks]:
    """Be one rank of a world that is not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        if nodes == 1:
            yield Ranks(dist.group.WORLD)
        else:
            shape = (nodes, world_size // nodes)
            yield as_ranks(init_device_mesh("cpu", shape, mesh_dim_names=("node", "local")))
    finally:
        dist.destroy_process_group()


@contextmanager
def stand_ins(spans: Recorder) -> Iterator[None]:
    """Let every message deliver a copy of what this rank sends, in spans of the kind "fill"."""
    names = ((messages, "all_gather"), (messages, "reduce_scatter"))
    names += ((dist, "all_to_all_single"), (dist, "batch_isend_irecv"))
    originals = [getattr(owner, name) for owner, name in names]
    gather, reduce_scatter, all_to_all, exchange = originals

    def fill(into: Tensor, source: Tensor) -> None:
        with spans.span("stand_in", "fill", 0, into.device):
            into.copy_(source)

    def stand_in_gather(output: Tensor, input: Tensor, **kwargs: Any) -> Any:
        fill(output.view(-1, input.numel()), input.reshape(1, -1))
        return gather(output, input, **kwargs)

    def stand_in_reduce_scatter(output: Tensor, input: Tensor, **kwargs: Any) -> Any:
        fill(output.view(-1), input.view(-1)[: output.numel()])
        return reduce_scatter(output, input, **kwargs)

    def stand_in_all_to_all(output: Tensor, input: Tensor, **kwargs: Any) -> Any:
        fill(output, input)
        return all_to_all(output, input, **kwargs)

    def stand_in_exchange(ops: list[Any]) -> Any:
        sent = next(op.tensor for op in ops if op.op is dist.isend)
        for op in ops:
            if op.op is dist.irecv:
                fill(op.tensor, sent)
        return exchange(ops)

    replaced = (stand_in_gather, stand_in_reduce_scatter, stand_in_all_to_all, stand_in_exchange)
    for (owner, name), function in zip(names, replaced, strict=True):
        setattr(owner, name, function)
    try:
        yield
    finally:
        for (owner, name), function in zip(names, originals, strict=True):
            setattr(owner, name, function)


def _gate_on_gloo(group: Any, rotation: str, layout: Any, heads: tuple[int, int]) -> str | None:
    ranks = as_ranks(group)
    return gate(ranks, torch.device("cpu"), rotation, layout, torch.float64, heads, 16)


def check(args: argparse.Namespace, rotation: str, device: torch.device, dtype: Any) -> None:
    """Check the rotation on gloo ranks, and the kernel here; raise if either is wrong."""
    pool = RankPool(args.simulate_ranks, timeout=600)
    nodes = {} if args.nodes == 1 else {"num_nodes": args.nodes}
    heads = (args.heads, args.kv_heads)
    try:
        said = pool.run(_gate_on_gloo, args.simulate_ranks, rotation, args.layout, heads, **nodes)
    finally:
        pool.close()
    if said[0] is not None:
        raise SystemExit(f"{rotation} is wrong, so nothing is timed: {said[0]}")
    if device.type == "cuda":
        _check_kernel(args, device, dtype)


def _check_kernel(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    like = torch.empty(1, 1, args.heads, args.head_dim, dtype=dtype, device=device)
    name = make_plan(
        like, like[:, :, : args.kv_heads], Ranks(), args.layout, "auto", args.backend, True, None
    ).backend
    for queries, keys, causal in ((512, 512, True), (512, 1536, False)):
        shapes = ((queries, args.heads), (keys, args.kv_heads), (keys, args.kv_heads))
        q, k, v = (torch.randn(2, n, h, args.head_dim, device=device).to(dtype) for n, h in shapes)
        dout, scale = torch.randn_like(q), args.head_dim**-0.5
        answers = []
        for block, kind in (
            (BLOCKS[name], dtype),
            (BLOCKS["math"], dtype),
            (BLOCKS["math"], torch.float64),
        ):
            x, y, z, g = (t.to(kind) for t in (q, k, v, dout))
            out, lse = block.forward(x, y, z, causal, scale)
            answers.append((out, *block.backward(g, x, y, z, out, lse, causal, scale)))
        for title, *three in zip(("out", "dq", "dk", "dv"), *answers, strict=True):
            assert_within_budget(f"{name} {title}", *three)


def in_turn(
    args: argparse.Namespace,
    config: LighthouseConfig | None,
    rotation: str,
    seqlen: int,
    device: torch.device,
    dtype: torch.dtype,
    kernels: list[str],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Check, measure and print one rotation; return its numbers."""
    check(args, rotation, device, dtype)
    alone = _job(args, config, "auto", seqlen, device, dtype, Ranks())
    fastest, single_times = _fastest(alone, kernels, args.repeats)
    world = args.simulate_ranks
    ranks = []
    for rank in range(world):
        with world_without_messages(rank, world, args.nodes) as without:
            job = _job(args, config, rotation, seqlen, device, dtype, without)
            ranks.append(_one_rank(job, alone, fastest, args.repeats, facts["copy_gb_s"] * 1e9))
    row: dict[str, Any] = {
        "rotation": rotation,
        "seqlen": seqlen,
        "subsequence": alone.entries,
        "world_size": world,
        "backend": job.plan.backend,
        "fastest": fastest,
        "single_ms": {name: {p: 1e3 * t[p] for p in t} for name, t in single_times.items()},
        "ranks": ranks,
    }
    for phase in PHASES:
        row[phase] = max(r["ratio"][phase] for r in ranks)
        if config is not None:
            row["layer_" + phase] = max(r["layer_over_limit"][phase] for r in ranks)
    _print(row, config)
    return row


def _print(row: dict[str, Any], config: LighthouseConfig | None) -> None:
    print(
        f"{row['rotation']} S={row['subsequence']:,} W={row['world_size']} {row['backend']}: "
        f"slowest rank x W over {row['fastest']} on one device: forward {row['forward']:.3f}, "
        f"backward {row['backward']:.3f}, both {row['both']:.3f}"
    )
    if config is not None:
        peak = max(r["peak_gib"] for r in row["ranks"])
        print(
            f"  whole layer, N={row['seqlen']:,}, over the limit: forward "
            f"{row['layer_forward']:.3f}, backward {row['layer_backward']:.3f}, both "
            f"{row['layer_both']:.3f}; peak {peak:.2f} GiB"
        )
    for rank, r in enumerate(row["ranks"]):
        times = ", ".join(f"{phase} {r['ms'][phase]:.3f}" for phase in PHASES)
        print(f"  rank {rank}: ms {times}; ratio {r['ratio']['both']:.3f}")
    print(flush=True)


def _job(
    args: argparse.Namespace,
    config: LighthouseConfig | None,
    rotation: str,
    seqlen: int,
    device: torch.device,
    dtype: torch.dtype,
    ranks: Ranks,
) -> Job:
    entries = seqlen if config is None else config.subsequence_length(seqlen)
    like = torch.empty((1, 1, args.heads, args.head_dim), dtype=dtype, device=device)
    kv = like[:, :, : args.kv_heads]
    return Job(
        config=config,
        tokens=seqlen,
        entries=entries,
        heads=(args.heads, args.kv_heads),
        head_dim=args.head_dim,
        batch=args.batch,
        dtype=dtype,
        device=device,
        plan=make_plan(like, kv, ranks, args.layout, rotation, args.backend, True, None),
        kernels=args.kernels,
    )


def _alternate(runs: dict[str, Runner], spans: Recorder, device: Any, repeats: int) -> Times:
    """Time the runs in turn, every phase, each long enough; two unmeasured rounds before."""
    times: Times = {name: {phase: [] for phase in PHASES} for name in runs}
    calls = dict.fromkeys(runs, 1)
    for repeat in range(repeats + 2):
        for phase in PHASES:
            for name, runner in runs.items():
                sample = take(runner, phase, spans, calls[name])
                fills = sum(b - a for _, kind, _, a, b in sample.spans if kind == "fill")
                seconds = sample.seconds - fills / sample.calls
                if repeat >= 2:
                    times[name][phase].append(seconds)
                elif repeat == 1 and phase == "both" and device.type == "cuda":
                    calls[name] = min(100, math.ceil(0.02 / seconds))
    return times


def _single(job: Job, backend: str, spans: Recorder) -> Runner:
    plan = replace(
        job.plan, ranks=Ranks(), layout=make_layout(job.plan.layout.name, 1), backend=backend
    )
    return job.attention(plan, spans, job.entries)


def _fastest(job: Job, kernels: list[str], repeats: int) -> tuple[str, dict[str, dict[str, float]]]:
    """The kernel that takes least for forward and backward on the whole, and all their seconds."""
    spans = Recorder(job.device)
    runs = {name: _single(job, name, spans) for name in kernels}
    times = _alternate(runs, spans, job.device, repeats)
    medians = {
        name: {phase: statistics.median(s) for phase, s in by_phase.items()}
        for name, by_phase in times.items()
    }
    return min(medians, key=lambda name: medians[name]["both"]), medians


def _one_rank(job: Job, alone: Job, fastest: str, repeats: int, bandwidth: float) -> dict[str, Any]:
    device, world = job.device, job.plan.ranks.world_size
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    spans = Recorder(device)
    runs = {
        "single": _single(alone, fastest, spans),
        "rank": job.attention(job.plan, spans, job.entries // world),
    }
    if job.config is not None:
        runs["layer"] = job.layer(job.plan.ranks, spans, job.tokens // world)
    with stand_ins(spans):
        times = _alternate(runs, spans, device, repeats)
    if not runs["rank"].finite():
        raise SystemExit("a message delivered nothing, so these times mean nothing")
    found: dict[str, Any] = {"ms": {}, "ratio": {}, "layer_ms": {}, "layer_over_limit": {}}
    heads, rows = sum(job.heads), 2 * job.batch * (job.tokens + job.entries)
    moved = rows * heads * job.head_dim * job.dtype.itemsize / world / bandwidth
    for phase in PHASES:
        pairs = zip(times["rank"][phase], times["single"][phase], strict=True)
        found["ms"][phase] = 1e3 * statistics.median(times["rank"][phase])
        found["ratio"][phase] = statistics.median(world * mine / one for mine, one in pairs)
        if "layer" in runs:
            limit = statistics.median(times["single"][phase]) / world
            limit += moved * (2 if phase == "both" else 1)
            layer = statistics.median(times["layer"][phase])
            found["layer_ms"][phase] = 1e3 * layer
            found["layer_over_limit"][phase] = layer / limit
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    else:
        found["peak_gib"] = 0.0
    return found
