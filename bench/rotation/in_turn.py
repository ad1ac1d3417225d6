"""All ranks in turn on one device, without messages: what the rotation's compute alone costs.

Each rank runs its own schedule in a world of ranks that send nothing, beside the fastest kernel
on the whole, in turns. What others would have sent is random numbers that were there before, so
that kernels meet real data (zeros draw less power and run faster) and nothing is copied. On a GPU
every run is timed as a CUDA graph, and launched eagerly as well. Rotations are checked on gloo
ranks in float64 first, kernels on this device against float64.
"""

import argparse
import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from harness import gate
from latency_timing import Arm, Run, Spread, captured, interleaved

from lhcp.comm.layout import make_layout
from lhcp.comm.mesh import Ranks, as_ranks
from lhcp.config import LighthouseConfig
from lhcp.measure.report import PHASES
from lhcp.measure.runs import Job, Runner, filled
from lhcp.ring.block import BLOCKS
from lhcp.ring.function import make_plan
from lhcp.testing.ranks import RankPool
from lhcp.testing.tolerance import assert_within_budget
from lhcp.testing.world import world_without_messages
from lhcp.timing import UNTIMED

STEADY_MS = 1000.0
"""How long an arm runs before the next has its turn. Attention runs at the GPU's power limit, whose
clock follows the load slowly: in turns of 0.2 s an arm still runs at its neighbour's clock, and the
same code differs by 1%."""

GRAPHS = 3
"""Of each run, with inputs of their own. Of equal graphs the slowest takes 0.5% longer than the
fastest, again and again: the slowest of several ranks would be picked by that."""

Times = dict[str, dict[str, Spread]]
"""Run -> phase -> milliseconds."""


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
        like, like[:, :, : args.kv_heads], Ranks(), args.layout, "auto", args.backend, True, None, 1
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
    """Measure and print one rotation, which `check` found right; return its numbers."""
    alone = _job(args, config, "auto", seqlen, device, dtype, Ranks())
    fastest, single_ms = _fastest(alone, kernels, args.repeats)
    world = args.simulate_ranks
    ranks = []
    for rank in range(world):
        with world_without_messages(rank, world, args.nodes) as without:
            job = _job(args, config, rotation, seqlen, device, dtype, without)
            ranks.append(_one_rank(job, alone, fastest, args.repeats, facts["copy_gb_s"] * 1e6))
    row: dict[str, Any] = {
        "rotation": job.plan.rotation,
        "seqlen": seqlen,
        "subsequence": alone.entries,
        "world_size": world,
        "backend": job.plan.backend,
        "fastest": fastest,
        "single_ms": single_ms,
        "ranks": ranks,
    }
    for name in ranks[0]["ratio"]:
        row[name] = {phase: max(r["ratio"][name][phase] for r in ranks) for phase in PHASES}
    _print(row, config)
    return row


def _print(row: dict[str, Any], config: LighthouseConfig | None) -> None:
    print(
        f"{row['rotation']} S={row['subsequence']:,} N={row['seqlen']:,} W={row['world_size']} "
        f"{row['backend']}: slowest rank x W over {row['fastest']} on one device"
    )
    for name in row["ranks"][0]["ratio"]:
        what = "whole layer over its limit" if "layer" in name else "attention"
        ratios = ", ".join(f"{phase} {row[name][phase]:.3f}" for phase in PHASES)
        print(f"  {what}, {'eager' if 'eager' in name else 'graph'}: {ratios}")
    if config is not None:
        print(f"  peak {max(r['peak_gib'] for r in row['ranks']):.2f} GiB on a rank")
    for rank, r in enumerate(row["ranks"]):
        cells = [
            f"{name} f {r['ms'][name]['forward']:.3f} f+b {r['ms'][name]['both']:.3f} "
            f"±{r['spread'][name]:.1f}%"
            for name in r["ms"]
        ]
        print(f"  rank {rank}: ms " + ", ".join(cells))
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
    like = torch.empty((args.batch, 1, args.heads, args.head_dim), dtype=dtype, device=device)
    local = entries // ranks.world_size
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
        plan=make_plan(like, kv, ranks, args.layout, rotation, args.backend, True, None, local),
        kernels=args.kernels,
    )


def _time(runners: dict[str, list[Runner]], device: torch.device, repeats: int) -> Times:
    """Time forwards and forwards with backwards, all in turns; a backward is the difference.

    Args:
        runners: several of one name are as many samples of it.
    """
    arms: dict[str, Run] = {}
    for name, equals in runners.items():
        for i, runner in enumerate(equals):
            for phase in ("forward", "both"):
                arms[f"{name} {phase} {i}"] = _run(runner, phase, device, graph="eager" not in name)
    if device.type == "cuda":
        found = interleaved(
            {name: Arm(run, repeats, STEADY_MS, most_calls=1000) for name, run in arms.items()}
        )
    else:
        found = _on_the_host(arms, repeats)
    times: Times = {}
    for name, equals in runners.items():
        forward, both = (
            _pooled([found[f"{name} {phase} {i}"] for i in range(len(equals))])
            for phase in ("forward", "both")
        )
        backward = Spread(
            both.median - forward.median,
            both.low - forward.high,
            both.high - forward.low,
            both.count,
        )
        times[name] = {"forward": forward, "backward": backward, "both": both}
    return times


def _pooled(found: list[Spread]) -> Spread:
    """The middle of equal runs, and how far they reach together."""
    middle = median(spread.median for spread in found)
    low, high = min(spread.low for spread in found), max(spread.high for spread in found)
    return Spread(middle, low, high, sum(spread.count for spread in found))


def _run(runner: Runner, phase: str, device: torch.device, graph: bool) -> Run:
    def run() -> None:
        runner.run(phase)

    return captured(run) if graph and device.type == "cuda" else run


def _on_the_host(arms: dict[str, Run], repeats: int) -> dict[str, Spread]:
    samples: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + 1):
        for name, run in arms.items():
            begin = time.perf_counter()
            run()
            if repeat:
                samples[name].append(1e3 * (time.perf_counter() - begin))
    return {name: Spread.of(found) for name, found in samples.items()}


def _single(job: Job, backend: str) -> Runner:
    plan = replace(
        job.plan, ranks=Ranks(), layout=make_layout(job.plan.layout.name, 1), backend=backend
    )
    return job.attention(plan, UNTIMED, job.entries)


def _fastest(job: Job, kernels: list[str], repeats: int) -> tuple[str, dict[str, dict[str, float]]]:
    """The kernel that takes least for forward and backward on the whole, and all their times."""
    times = _time({name: [_single(job, name)] for name in kernels}, job.device, min(repeats, 5))
    medians = {name: {p: t[p].median for p in t} for name, t in times.items()}
    return min(medians, key=lambda name: medians[name]["both"]), medians


def _one_rank(job: Job, alone: Job, fastest: str, repeats: int, bytes_ms: float) -> dict[str, Any]:
    device, world = job.device, job.plan.ranks.world_size
    mine = {"rank": lambda: job.attention(job.plan, UNTIMED, job.entries // world)}
    if job.config is not None:
        mine["layer"] = lambda: job.layer(job.plan.ranks, UNTIMED, job.tokens // world)
    # Before others' numbers are drawn, which a rank does not hold.
    peak = _peak(list(mine.values())[-1](), device) if device.type == "cuda" else 0.0
    equals = range(GRAPHS if device.type == "cuda" else 1)
    runners = {"single": [_single(alone, fastest) for _ in equals]}
    runners |= {name: [filled(make()) for _ in equals] for name, make in mine.items()}
    for runner in runners["rank"]:
        runner.run("both")
        if not runner.finite():
            raise SystemExit("a message delivered nothing, so these times mean nothing")
    times = _time(runners, device, repeats)
    if device.type == "cuda":
        # Apart: a GPU that waits for launches cools down, and what it runs next is faster.
        eager = {f"{name} eager": runners[name][:1] for name in runners if name != "single"}
        times |= _time(eager, device, min(repeats, 3))
    single = {phase: times["single"][phase].median / world for phase in PHASES}
    rows, width = 2 * job.batch * (job.tokens + job.entries), job.head_dim * job.dtype.itemsize
    moved = rows * sum(job.heads) * width / world / bytes_ms
    limits = {p: single[p] + moved * (2 if p == "both" else 1) for p in PHASES}
    found: dict[str, Any] = {"ratio": {}, "ms": {}, "spread": {}, "peak_gib": peak}
    for name, by_phase in times.items():
        both = by_phase["both"]
        found["ms"][name] = {phase: t.median for phase, t in by_phase.items()}
        found["spread"][name] = 50 * (both.high - both.low) / both.median
        if name != "single":
            over = limits if "layer" in name else single
            found["ratio"][name] = {p: t.median / over[p] for p, t in by_phase.items()}
    return found


def _peak(runner: Runner, device: torch.device) -> float:
    """GiB that a run of forward and backward holds at most, all inputs included."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    runner.run("both")
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**30
