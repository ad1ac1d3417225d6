"""What do packed documents cost, or save: over the same call without, and over varlen attention?

    python -m bench.rotation.documents --backends flash --seqlens 131072
    torchrun --nproc-per-node 2 -m bench.rotation.documents --backends flash_attn fa4

Forward and backward of one layer with documents and without, launched call by call and, where a
call is short, as CUDA graphs; beside them dense attention by the varlen function of the package
that is behind the backend, on one GPU with the whole sequence, and ring-flash-attn's two rings.
Lengths of documents are lognormal; all arms of a length run in turn, there and back, after a
barrier; a sample is the slowest rank's. Each backend is held against float64 first. The last line
is JSON.
"""

import argparse
from dataclasses import replace

import torch

import lhcp
from bench.common.arguments import add_ranks, make_parser, parse
from bench.common.card import shown_card
from bench.common.page import last_line, write
from bench.common.problem import TENSORS, AttentionProblem, Choice
from bench.common.ranks import all_ranks, dtype_of, run_on_ranks
from bench.common.turns import Spread
from bench.rotation.document_arms import RINGS
from bench.rotation.document_setting import Row, Setting, draw_bounds
from lhcp.comm.sharding import shard
from lhcp.testing.tolerance import assert_close_float64, assert_within_budget

GATE_TOKENS = 4096


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--seqlens", type=int, nargs="+", default=[131_072, 1_048_576])
    parser.add_argument("--modes", nargs="+", default=["lighthouse", "dense"])
    parts_help = "mean length of documents: N over this"
    parser.add_argument("--parts", type=int, nargs="*", default=[4, 32], help=parts_help)
    parser.add_argument("--means", type=int, nargs="*", default=[2048], help="mean lengths, tokens")
    parser.add_argument("--sigma", type=float, default=1.0, help="of the logarithm of lengths")
    parser.add_argument("--seed", type=int, default=4, help="of lengths")
    backends_help = "of both arms of a ratio; auto: what each would take"
    parser.add_argument("--backends", nargs="+", default=["auto"], help=backends_help)
    parser.add_argument("--rotation", default="auto")
    add_ranks(parser)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--graphs-below", type=float, default=30, help="ms of a call")
    return parse(parser)


def config_for(seqlen: int) -> lhcp.LighthouseConfig:
    """Return the paper's sizes for a length, the same on one rank and on two."""
    sizes = {"num_levels": 4, "topk": 4096} if seqlen > 2**19 else {}
    return lhcp.LighthouseConfig.fit(seqlen, 2, **sizes)


def gate(problem: AttentionProblem, choice: Choice, device: torch.device) -> None:
    """Hold a backend's documents against float64 on one rank, over a short sequence; a collective.

    In float64 on a CPU, whose flash kernel errs in float32 by more than plain attention.

    Raises:
        AssertionError: the error is more than twice that of plain attention in the same dtype; on a
            CPU, more than rounding in float64.
    """
    if device.type == "cpu":
        problem = replace(problem, dtype=torch.float64)
    starts = draw_bounds(problem.seqlen, problem.seqlen // 8, 1.0, 1)
    cu_seqlens = torch.cat([starts, torch.tensor([problem.seqlen])]).int()
    whole = problem.whole(device)
    more: Row = {"cu_seqlens": cu_seqlens}
    ranks = choice.ranks
    # As the backend has it without the ring; the error of this is the measure.
    plain: Row = {"backend": "math", **more}
    if problem.config is not None:
        q, k, *_ = whole
        plain["selection"] = lhcp.select(q, k, config=problem.config, **more)
    ours = problem.answer(tuple(shard(x, ranks) for x in whole), **choice.options, **more)
    same = problem.answer(whole, **plain)
    if problem.dtype == torch.float64:
        for name, got, theirs in zip(TENSORS, ours, same, strict=True):
            assert_close_float64(name, got, shard(theirs.contiguous(), ranks))
        return
    exact = problem.answer(tuple(x.double() for x in whole), **plain)
    for name, got, theirs, true in zip(TENSORS, ours, same, exact, strict=True):
        plain_of_rank, exact_of_rank = (shard(x.contiguous(), ranks) for x in (theirs, true))
        assert_within_budget(name, got, plain_of_rank, exact_of_rank)


def ratios(found: dict[str, Spread], world_size: int) -> dict[str, float]:
    """Return medians of packed arms over plain ones, over varlen / W and over other rings."""
    of: dict[str, float] = {}
    for name, spread in found.items():
        if not name.startswith("packed"):
            continue
        mean, *graph = name.split()[1:]
        over = {"plain": " ".join(["plain", *graph])}
        over |= {arm: f"{arm} {mean}" for arm in ("varlen", *RINGS)}
        for label, other in over.items():
            if other in found:
                share = world_size if label == "varlen" else 1
                text = f"{name} over {label}" + (" / W" if share > 1 else "")
                of[text] = spread.median * share / found[other].median
    return of


def print_row(row: Row) -> None:
    """Print a row in a few lines."""
    head = f"N={row['seqlen']:,} {row['mode']} {row['backend']} W={row['ranks']}"
    print(f"{head}, rotation: {row['rotation']}, documents: {row['documents']}")
    for name, spread in row["ms"].items():
        gib = row["peak_gib"].get(name)
        print(f"  {name:<24} {spread} ms ({spread.count})" + (f" {gib:.2f} GiB" if gib else ""))
    for name, value in row["ratios"].items():
        print(f"  {name:<40} {value:.3f}")
    for name, why in row["without"].items():
        print(f"  no {name}: {why}")
    print(flush=True, end="")


def measure(args: argparse.Namespace, device: torch.device) -> None:
    """Print the card and a row a length, mode and backend."""
    ranks = all_ranks(device)
    document: Row = {"card": shown_card(device, ranks), "rows": []}
    like = AttentionProblem.of(args, dtype_of(args.dtype, device))
    for backend in args.backends:
        choice = Choice(args.rotation if ranks.world_size > 1 else "auto", backend, ranks)
        for mode in args.modes:
            short = replace(like, seqlen=GATE_TOKENS, config=None)
            if mode == "lighthouse":
                short = replace(short, config=config_for(GATE_TOKENS))
            gate(short, choice, device)
        for seqlen in args.seqlens:
            for mode in args.modes:
                config = config_for(seqlen) if mode == "lighthouse" else None
                problem = replace(like, seqlen=seqlen, config=config)
                row = Setting(args, problem, choice, device).measure()
                row["ratios"] = ratios(row["ms"], ranks.world_size)
                document["rows"].append(row)
                if ranks.rank == 0:
                    print_row(row)
                    write(document, args.json)
    if ranks.rank == 0:
        last_line(document, args.json)


if __name__ == "__main__":
    run_on_ranks(measure, arguments())
