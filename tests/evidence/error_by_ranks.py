"""Does the error against float64 grow with the number of ranks? Dense attention and the layer.

    python -m tests.evidence.error_by_ranks --out bench/results/error_by_ranks_cpu_DATE

gloo ranks on a CPU, zigzag, the `cpu` backend. An error is a distance to the reference in float64
on the same rounded inputs, over the reference's own size, over all seeds together: the l2 norm (the
verdict) and the largest element. The selection is the same on any number of ranks, and checked to
be. Ends with status 1, naming the row, if the error at any number of ranks is above the bound times
the error of one rank.
"""

import argparse
import math
from contextlib import closing
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch

import lhcp
from bench.common.arguments import add_heads, add_layer, config_of, make_parser
from bench.common.card import dated_card
from bench.common.page import Page
from bench.common.problem import TENSORS, Answers, AttentionProblem
from lhcp.comm.mesh import Group, Ranks, as_ranks
from lhcp.console import escape_unprintable
from lhcp.ring.heads import TWO_AXES, sharing_ranks
from lhcp.testing.ranks import RankPool
from tests.cases import together
from tests.evidence.check_problem import exact_answers, select
from tests.evidence.whole import Entries, equal, whole_selection

BOUNDS = {"allgather": 1.5, "alltoall": 1.5} | dict.fromkeys(("p2p", *TWO_AXES), 2.0)
"""Error of W ranks over that of one; a ring merges in steps, the others attend in one or two."""
NUM_NODES = 2
Errors = dict[str, tuple[float, float]]
"""By tensor: relative l2 error, relative largest error."""


CPU = torch.device("cpu")


def answer(
    group: Group | Ranks, problem: AttentionProblem, rotation: str
) -> tuple[Answers, Entries | None]:
    """Return a rank's out, dq, dk, dv, and its entries in the whole sequence, if it selects."""
    ranks = as_ranks(group)
    own = tuple(lhcp.shard(x, ranks) for x in problem.whole(CPU))
    answers = problem.answer(own, group=ranks, rotation=rotation, backend="cpu")
    return answers, select(problem, own, ranks)


def errors(ours: Answers, truth: Answers) -> Errors:
    """Return relative errors of out, dq, dk, dv; infinite where an element is not a number."""
    found = {}
    for name, got, want in zip(TENSORS, ours, truth, strict=True):
        off = (got.double() - want).nan_to_num(nan=math.inf)
        largest = off.abs().max() / want.abs().max()
        found[name] = ((off.norm() / want.norm()).item(), largest.item())
    return found


def measure(
    pool: RankPool, args: argparse.Namespace, problem: AttentionProblem, page: Page
) -> dict[tuple[str, int], Errors]:
    """Return errors by (rotation, W); W = 1 under every rotation's name."""
    ours, entries = answer(None, problem, "auto")
    selection = None if entries is None else whole_selection([entries])
    truth, _ = exact_answers(problem, problem.whole(CPU), entries)
    one = errors(ours, truth)
    found = {}
    for rotation in args.rotations:
        found[rotation, 1] = one
        for world in args.ranks:
            nodes = NUM_NODES if rotation in TWO_AXES else None
            sharing = sharing_ranks(rotation, world, None if nodes is None else world // nodes)
            if problem.num_heads % sharing:
                continue
            parts = pool.run(answer, world, problem, rotation, num_nodes=nodes)
            whole = tuple(
                together(x, "zigzag") for x in zip(*(part for part, _ in parts), strict=True)
            )
            found[rotation, world] = errors(whole, truth)
            if selection is not None:
                chosen = whole_selection([entries for _, entries in parts])
                if not equal(chosen, selection):
                    page.wrong.append(f"{rotation}, W={world}: other entries than on one rank")
    return found


def pooled(by_seed: list[tuple[float, float]]) -> tuple[float, float]:
    """Pool both errors of all seeds."""
    norms, largest = zip(*by_seed, strict=True)
    return math.sqrt(fmean(norm**2 for norm in norms)), max(largest)


def tables(
    page: Page, args: argparse.Namespace, title: str, by_seed: list[dict[tuple[str, int], Errors]]
) -> list[Any]:
    """Show both tables of one computation in one dtype; the l2 one is held against the bounds."""
    worlds = [1, *args.ranks]
    names = ["rotation", "tensor", *(f"W={world}" for world in worlds), "most over W=1"]
    records = []
    for which, what in enumerate(("l2", "largest element")):
        note = f"Relative to the reference in float64; {len(by_seed)} seeds together."
        page.table(f"{title}: {what}", note, names if which else [*names, "bound"])
        for rotation in args.rotations:
            for tensor in TENSORS:
                errors = {
                    world: pooled([found[rotation, world][tensor] for found in by_seed])[which]
                    for world in worlds
                    if (rotation, world) in by_seed[0]
                }
                ratio = max(errors.values()) / errors[1]
                cells = [f"{errors[w]:.2e}" if w in errors else "-" for w in worlds]
                cells.append(f"{ratio:.2f}")
                if which == 0:
                    cells.append(f"{BOUNDS[rotation]}")
                    if not ratio <= BOUNDS[rotation]:
                        page.wrong.append(f"{title}, {rotation}, {tensor}: {ratio:.2f}")
                page.row(rotation, tensor, *cells)
                record = {"computation": title, "rotation": rotation, "tensor": tensor}
                records.append(record | {"error": what, "by_ranks": errors, "ratio": ratio})
    return records


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4, 8, 16], help="beside one")
    parser.add_argument("--rotations", nargs="*", default=list(BOUNDS), choices=list(BOUNDS))
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--seqlen", type=int, default=2048, help="of dense attention")
    parser.add_argument("--layer-seqlen", type=int, default=8192, help="tokens of the layer")
    add_layer(parser, topk=128, strata=32)
    add_heads(parser, heads=4, head_dim=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", help="write <out>.md and <out>.json")
    return parser.parse_args(arguments)


def report(args: argparse.Namespace, pool: RankPool) -> None:
    """Measure and print everything; ends the program with status 1 if a row does not hold."""
    config = config_of(args)
    assert config is not None
    entries = config.subsequence_length(args.layer_seqlen)
    kinds = {
        f"dense, S={args.seqlen:,}": (args.seqlen, None),
        f"layer, N={args.layer_seqlen:,}, S={entries:,}": (args.layer_seqlen, config),
    }
    facts = dated_card(
        CPU,
        ranks=f"gloo, W = 1, {', '.join(map(str, args.ranks))}; two axes as {NUM_NODES} nodes",
        sizes=f"B=1, H=Hk={args.heads}, head_dim {args.head_dim}, zigzag, backend cpu, {config}",
    )
    page = Page("Error against float64 by number of ranks", facts)
    records = []
    for dtype in args.dtypes:
        for kind, (seqlen, config_of_kind) in kinds.items():
            sizes = {"seqlen": seqlen, "config": config_of_kind}
            problem = AttentionProblem.of(args, getattr(torch, dtype), **sizes)
            by_seed = [
                measure(pool, args, replace(problem, seed=seed), page) for seed in range(args.seeds)
            ]
            records += tables(page, args, f"{dtype}, {kind}", by_seed)
    page.close(args.out, records)


def main() -> None:
    args = parse()
    with closing(RankPool(max(args.ranks), timeout=600)) as pool:
        report(args, pool)


if __name__ == "__main__":
    escape_unprintable()
    main()
