"""Is every rotation right on these ranks? Dense attention and the layer, forward and backward.

    torchrun --nproc-per-node 8 -m tests.evidence.check_ranks               # against float64
    torchrun --nproc-per-node 8 -m tests.evidence.check_ranks --documents 24     # packed ones
    torchrun --nproc-per-node 8 -m tests.evidence.check_ranks --long-seqlens 262144 1048576
    torchrun --nproc-per-node 2 -m tests.evidence.check_ranks --device cpu --heads 2 ...

Rank 0 computes the whole alone. At the small lengths out, dq, dk and dv are held against float64
by the error budget of lhcp/testing/tolerance.py, at the long ones against rank 0 by relative l2
distance; selections must be equal bit for bit. Where ring-flash-attn is installed, our errors are
held against its errors on the same tensors. Ranks beyond the GPUs share them. The last line is
JSON; ends with status 1, naming what is wrong.
"""

import argparse
from typing import Any

import torch

from bench.common.arguments import add_ranks, make_parser
from bench.common.arguments import parse as parse_with_kv_heads
from bench.common.card import shown_card
from bench.common.page import last_line
from bench.common.problem import (
    PEER,
    TENSORS,
    AttentionProblem,
    Choice,
    choices,
    choices_beside_peer,
)
from bench.common.ranks import all_ranks, dtype_of, run_on_ranks
from lhcp.comm.mesh import Ranks
from lhcp.config import LighthouseConfig
from lhcp.measure.rank_values import gathered
from lhcp.ring.rotation import NAMES
from lhcp.training.process import leave
from tests.evidence.check_problem import prepare
from tests.evidence.check_rows import (
    Errors,
    Row,
    against_float64,
    against_one_rank,
    compiled,
    over_peer,
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--rotations", nargs="*", default=["auto", *NAMES])
    add_ranks(parser)
    parser.add_argument("--backend", default="auto", help="beside flash_attn next to the peer")
    parser.add_argument("--dense-seqlen", type=int, default=4096, help="against float64")
    parser.add_argument("--layer-seqlen", type=int, default=16_384, help="against float64")
    parser.add_argument("--documents", type=int, default=0, help="that sequences are packed of")
    parser.add_argument("--layer-topk", type=int, default=256)
    parser.add_argument("--strata", type=int, default=16)
    parser.add_argument("--long-seqlens", type=int, nargs="*", default=[], help="of the layer")
    parser.add_argument("--long-dense-seqlens", type=int, nargs="*", default=[])
    parser.add_argument("--long-topk", type=int, default=4096)
    parser.add_argument("--long-levels", type=int, default=4)
    parser.add_argument("--long-only", action="store_true", help="only rank 0 against float64")
    parser.add_argument("--nodes", type=int, default=2, help="the outer of two axes")
    parser.add_argument("--compiler", default="inductor", help="of torch.compile; none: skip it")
    parser.add_argument("--goal", type=float, default=1.05, help="error over ring-flash-attn's")
    parser.add_argument("--slack", type=float, default=1.0, help="times the long bounds")
    return parse_with_kv_heads(parser, arguments)


def problems(
    args: argparse.Namespace, dtype: torch.dtype
) -> tuple[list[AttentionProblem], list[AttentionProblem]]:
    """Return what is held against float64, and what is held against one rank."""

    def problem(seqlen: int, config: LighthouseConfig | None = None) -> AttentionProblem:
        documents = {"num_documents": args.documents}
        return AttentionProblem.of(args, dtype, seqlen=seqlen, config=config, **documents)

    short = LighthouseConfig(
        num_levels=3, pool_factor=4, topk=args.layer_topk, num_strata=args.strata
    )
    small = [problem(args.dense_seqlen), problem(args.layer_seqlen, short)]
    long = [problem(seqlen) for seqlen in args.long_dense_seqlens]
    if args.long_seqlens:
        config = LighthouseConfig(
            num_levels=args.long_levels,
            pool_factor=4,
            topk=args.long_topk,
            num_strata=args.strata,
        )
        long += [problem(seqlen, config) for seqlen in args.long_seqlens]
    return small, long


def check(args: argparse.Namespace, nodes: Ranks, device: torch.device) -> dict[str, Any]:
    """Do all rows; the same document on every rank.

    Args:
        nodes: all ranks; of two axes where rotations that want them are to be checked.
    """
    ranks, shown = Ranks(nodes.flat), nodes.rank == 0
    dtype = dtype_of(args.dtype, device)
    small, long = problems(args, dtype)
    rows: list[Row] = []
    one: dict[str, Errors] = {}
    missing: str | None = f"{PEER}: --long-only was given"
    for problem in small:
        own = prepare(problem, ranks, device, args.backend, exact=True)
        chosen: list[Choice] = []
        if not args.long_only:
            wanted = (args.backend, args.rotations)
            if args.documents:
                chosen = choices(nodes, args.heads, [args.backend], args.rotations)
                missing = f"{PEER}: sequences are packed of documents"
            else:
                chosen, missing = choices_beside_peer(nodes, own.inputs[0], *wanted)
        found, one[problem.kind] = against_float64(own, chosen, ranks)
        rows += show(found, shown)
        if problem.config is not None and args.compiler != "none":
            rows += show([compiled(own, ranks, args.compiler)], shown)
    rows += show(over_peer(rows, args.goal), shown)
    for problem in long:
        own = prepare(problem, ranks, device, args.backend, exact=False)
        chosen = choices(nodes, args.heads, [args.backend], args.rotations)
        rows += show(against_one_rank(own, chosen, ranks, one[problem.kind], args.slack), shown)
    wrong = [f"{title(row)}: {row['wrong']}" for row in rows if row["wrong"]]
    document: dict[str, Any] = {"rows": rows, "one_rank": one, "peer_missing": missing}
    document |= {"dtype": str(dtype).removeprefix("torch."), "wrong": wrong}
    if device.type == "cuda":
        document["peak_gib_rank0"] = torch.cuda.max_memory_allocated(device) / 2**30
    return document


def title(row: Row) -> str:
    took = "" if row["took"] == row["rotation"] else f" ({row['took']})"
    name = f"{row['kind']} {row['seqlen']:,} {row['rotation']}{took} {row['backend']}"
    return f"{row['check']:<9} {name}"


def show(rows: list[Row], shown: bool) -> list[Row]:
    """Print a line a row on rank 0; return the rows."""
    for row in rows if shown else ():
        values = row.get("ratio") or row.get("error") or {}
        form = ".3f" if "ratio" in row else ".2e"
        cells = "  ".join(f"{name} {values[name]:{form}}" for name in TENSORS if name in values)
        print(f"{title(row):<64} {cells}  {row['wrong'] or 'right'}", flush=True)
    return rows


def measure(args: argparse.Namespace, device: torch.device) -> None:
    """Print card, rows, verdict."""
    nodes = all_ranks(device, args.nodes, must_divide=False)
    facts = shown_card(device, nodes)
    document = check(args, nodes, device)
    if nodes.rank == 0:
        if document["peer_missing"]:
            print(f"not compared: {document['peer_missing']}")
        for text in document["wrong"]:
            print(f"WRONG: {text}")
        last_line({"card": facts, **document}, args.json)
    if document["wrong"]:
        # Together: the launcher ends the others once one rank has failed.
        gathered(None, nodes)
        leave(1)


if __name__ == "__main__":
    run_on_ranks(measure, parse())
