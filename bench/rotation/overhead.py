"""What the rotation costs: the real thing beside its twins, on these ranks.

    torchrun --nproc-per-node 4 -m bench.rotation.overhead --rotations p2p allgather
    torchrun --nnodes 2 ... -m bench.rotation.overhead --nodes 2 --rotations hierarchical --topk ...
    python -m bench.rotation.overhead --simulate-ranks 8 --seqlens 65536     # ranks in turn

Checks each rotation against one rank first, and prints no time of one that is wrong. With --topk
--seqlens are tokens of the layer, else tokens of dense attention. --simulate-ranks takes one device
and sends no messages: see bench/rotation/in_turn.py. The last line is JSON.
"""

import argparse
import json
from typing import Any

import torch

from bench.common.arguments import add_layer, add_lengths, add_ranks, config_of, make_parser, parse
from bench.common.card import shown_card
from bench.common.gate import gate, refuse
from bench.common.page import last_line, write
from bench.common.problem import AttentionProblem, Choice
from bench.common.ranks import all_ranks, dtype_of, run_on_ranks
from bench.rotation.in_turn import simulate
from bench.rotation.timeline import draw
from lhcp.console import escape_unprintable
from lhcp.measure import OverheadReport, measure_overhead
from lhcp.ring.heads import TWO_AXES


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    add_lengths(parser)
    add_layer(parser)
    add_ranks(parser)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--calls", type=int, help="calls in a row that one measurement times")
    parser.add_argument("--single-seconds", type=float, default=10.0, help="the most T1 may take")
    parser.add_argument("--simulate-ranks", type=int, help="ranks in turn on one device")
    parser.add_argument("--png", help="write a timeline of the last measurement here")
    args = parse(parser)
    wants = sorted(set(args.rotations).intersection(TWO_AXES))
    if args.simulate_ranks and args.nodes == 1 and wants:
        parser.error(f"{wants[0]} needs --nodes 2 or more")
    return args


def measure(args: argparse.Namespace, device: torch.device) -> None:
    """Print card, tables, timeline, JSON; the same work on every rank, printed by rank 0."""
    ranks = all_ranks(device, args.nodes)
    shown, dtype = ranks.rank == 0, dtype_of(args.dtype, device)
    facts = shown_card(device, ranks)
    like = AttentionProblem.of(args, dtype)
    reports: list[OverheadReport] = []
    document: dict[str, Any] = {"card": facts, "reports": []}
    for rotation in args.rotations:
        refuse(rotation, gate(Choice(rotation, args.backend, ranks, args.layout), like, device))
        for seqlen in args.seqlens:
            report = measure_overhead(
                config_of(args),
                seqlen=seqlen,
                num_heads=args.heads,
                num_kv_heads=args.kv_heads,
                head_dim=args.head_dim,
                batch=args.batch,
                dtype=dtype,
                group=ranks,
                layout=args.layout,
                rotation=rotation,
                backend=args.backend,
                kernels=args.kernels,
                device=device,
                repeats=args.repeats,
                warmup=args.warmup,
                calls=args.calls,
                single_seconds=args.single_seconds,
            )
            reports.append(report)
            document["reports"].append(json.loads(report.to_json()))
            if shown:
                print(report.table() + "\n", flush=True)
                # A run that is cut off leaves what it had.
                write(document, args.json)
    if shown:
        if args.png and reports:
            draw(reports[-1], args.png)
        last_line(document, args.json)


def main() -> None:
    args = arguments()
    if args.simulate_ranks:
        simulate(args)
    else:
        run_on_ranks(measure, args)


if __name__ == "__main__":
    escape_unprintable()
    main()
