"""All ranks in turn on one device, without messages: what the rotation's compute alone costs.

Each rank runs its own schedule in a world of ranks that send nothing, beside the fastest kernel
on the whole, in turns. What others would have sent is random numbers that were there before, so
that kernels meet real data (zeros draw less power and run faster) and nothing is copied. On a GPU
every run is timed as a CUDA graph, and launched eagerly as well. Rotations are checked on gloo
ranks in float64 first, kernels on this device against float64.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch

from bench.common.card import shown_card
from bench.common.page import last_line
from bench.common.ranks import dtype_of
from bench.common.turns import Arm, Spread, captured, interleaved
from bench.rotation.in_turn_setting import InTurnSetting, check
from lhcp.comm.mesh import Ranks
from lhcp.measure.clock import Run, peak_gib
from lhcp.measure.runs import Job, Runner, filled
from lhcp.measure.timings import PHASES
from lhcp.measure.twins import RandomReceiveBuffers
from lhcp.testing.world import world_without_messages
from lhcp.timing import Spans

STEADY_MS = 1000.0
"""How long an arm runs before the next has its turn. Attention runs at the GPU's power limit, whose
clock follows the load slowly: in turns of 0.2 s an arm still runs at its neighbour's clock, and the
same code differs by 1%."""

GRAPHS = 3
"""Of each run, with inputs of their own. Of equal graphs the slowest takes 0.5% longer than the
fastest, again and again: the slowest of several ranks would be picked by that."""

NAMED = Spans()
"""Not through operators, which make their own ranks: these would not put random numbers where
others' would be."""

Times = dict[str, dict[str, Spread]]
"""Run -> phase -> milliseconds."""


def simulate(args: argparse.Namespace) -> None:
    """Measure every rotation and length that the command line of overhead.py names."""
    use_gpu = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", 0) if use_gpu else torch.device("cpu")
    facts = shown_card(device, Ranks(), **{"ranks in turn": args.simulate_ranks})
    setting = InTurnSetting(args, device, dtype_of(args.dtype, device), facts["copy_gb_s"] * 1e9)
    rows = []
    for rotation in args.rotations:
        check(setting, rotation)
        rows += [in_turn(setting, rotation, seqlen) for seqlen in args.seqlens]
    last_line({"card": facts, "in_turn": rows}, args.json)


def in_turn(setting: InTurnSetting, rotation: str, seqlen: int) -> dict[str, Any]:
    """Measure and print one rotation, which `check` found right; return its numbers."""
    args, world = setting.args, setting.args.simulate_ranks
    alone = setting.job("auto", seqlen, Ranks())
    fastest, single_ms = _fastest(alone, setting.kernels, args.repeats)
    ranks = []
    for rank in range(world):
        with world_without_messages(rank, world, args.nodes) as without:
            job = setting.job(rotation, seqlen, without)
            single = partial(_single, alone, fastest)
            ranks.append(_one_rank(job, single, args.repeats, setting.copy_rate))
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
    _print(row)
    return row


def _print(row: dict[str, Any]) -> None:
    print(
        f"{row['rotation']} S={row['subsequence']:,} N={row['seqlen']:,} W={row['world_size']} "
        f"{row['backend']}: slowest rank x W over {row['fastest']} on one device"
    )
    for name in row["ranks"][0]["ratio"]:
        what = "whole layer over its limit" if "layer" in name else "attention"
        ratios = ", ".join(f"{phase} {row[name][phase]:.3f}" for phase in PHASES)
        print(f"  {what}, {'eager' if 'eager' in name else 'graph'}: {ratios}")
    if "layer" in row:
        print(f"  peak {max(r['peak_gib'] for r in row['ranks']):.2f} GiB on a rank")
    for rank, r in enumerate(row["ranks"]):
        cells = [
            f"{name} f {r['ms'][name]['forward']:.3f} f+b {r['ms'][name]['both']:.3f} "
            f"±{r['spread'][name]:.1f}%"
            for name in r["ms"]
        ]
        print(f"  rank {rank}: ms " + ", ".join(cells))
    print(flush=True)


def _time(runners: dict[str, list[Runner]], device: torch.device, repeats: int) -> Times:
    """Time forwards and forwards with backwards, all in turns; a backward is the difference.

    Args:
        runners: several of one name are as many samples of it.
    """
    arms: dict[str, Run] = {}
    for name, equals in runners.items():
        for i, runner in enumerate(equals):
            for phase in ("forward", "both"):
                run = partial(runner.run, phase)
                graph = device.type == "cuda" and "eager" not in name
                arms[f"{name} {phase} {i}"] = captured(run) if graph else run
    steady = STEADY_MS if device.type == "cuda" else 0.0
    found = interleaved(
        {name: Arm(run, repeats, steady, 1000) for name, run in arms.items()}, device
    )
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
    """Return the middle of equal runs, and how far they reach together."""
    middle = median(spread.median for spread in found)
    low, high = min(spread.low for spread in found), max(spread.high for spread in found)
    return Spread(middle, low, high, sum(spread.count for spread in found))


def _single(job: Job, backend: str) -> Runner:
    plan = replace(job.plan.on_one_rank(*job.heads), backend=backend)
    return job.attention(plan, NAMED, job.entries)


def _fastest(job: Job, kernels: list[str], repeats: int) -> tuple[str, dict[str, dict[str, float]]]:
    """Find the kernel that takes least for both directions on the whole, and all their times."""
    times = _time({name: [_single(job, name)] for name in kernels}, job.device, min(repeats, 5))
    medians = {name: {p: t[p].median for p in t} for name, t in times.items()}
    return min(medians, key=lambda name: medians[name]["both"]), medians


def _numbered(make: Callable[[Ranks], Runner], ranks: Ranks) -> Runner:
    """Make a runner for which others' numbers are there, its own ones."""
    buffers = RandomReceiveBuffers()
    return filled(make(replace(ranks, allocate=buffers)), buffers)


def _one_rank(
    job: Job, single: Callable[[], Runner], repeats: int, copy_rate: float
) -> dict[str, Any]:
    device, ranks = job.device, job.plan.ranks
    world = ranks.world_size
    mine: dict[str, Callable[[Ranks], Runner]] = {
        "rank": lambda of: job.attention(replace(job.plan, ranks=of), NAMED, job.entries // world)
    }
    if job.config is not None:
        mine["layer"] = lambda of: job.layer(of, NAMED, job.tokens // world)
    # Without others' numbers, which a rank does not hold.
    peak, largest = 0.0, list(mine.values())[-1]
    if device.type == "cuda":
        peak = peak_gib(partial(largest(ranks).run, "both"), device)
    equals = range(GRAPHS if device.type == "cuda" else 1)
    runners = {"single": [single() for _ in equals]}
    runners |= {name: [_numbered(make, ranks) for _ in equals] for name, make in mine.items()}
    for runner in runners["rank"]:
        runner.run("both")
        if not runner.finite():
            raise SystemExit("a message delivered nothing, so these times mean nothing")
    times = _time(runners, device, repeats)
    if device.type == "cuda":
        # Apart: a GPU that waits for launches cools down, and what it runs next is faster.
        eager = {f"{name} eager": runners[name][:1] for name in runners if name != "single"}
        times |= _time(eager, device, min(repeats, 3))
    share = {phase: times["single"][phase].median / world for phase in PHASES}
    rows, width = 2 * job.batch * (job.tokens + job.entries), job.head_dim * job.dtype.itemsize
    moved = 1e3 * rows * sum(job.heads) * width / world / copy_rate
    limits = {p: share[p] + moved * (2 if p == "both" else 1) for p in PHASES}
    found: dict[str, Any] = {"ratio": {}, "ms": {}, "spread": {}, "peak_gib": peak}
    for name, by_phase in times.items():
        found["ms"][name] = {phase: t.median for phase, t in by_phase.items()}
        found["spread"][name] = by_phase["both"].percent
        if name != "single":
            over = limits if "layer" in name else share
            found["ratio"][name] = {p: t.median / over[p] for p, t in by_phase.items()}
    return found
