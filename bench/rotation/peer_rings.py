"""Our rotations and ring-flash-attn's zigzag ring in turn, on the same ranks and tensors.

    torchrun --nproc-per-node 8 -m bench.rotation.peer_rings --seqlens 65536 131072
    torchrun --nproc-per-node 2 -m bench.rotation.peer_rings --device cpu --seqlens 2048 ...

Dense causal attention over S tokens, which is also what the layer does over its sub-sequence. Every
ring runs once in each repeat, after a barrier; a repeat counts its slowest rank; medians. Each ring
is checked against one rank first, and one that is wrong is not timed. Without the package ours are
timed alone. The last line is JSON.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import lhcp
from bench.common.arguments import add_ranks, make_parser, parse
from bench.common.card import shown_card
from bench.common.gate import gate, refuse
from bench.common.page import last_line, write
from bench.common.problem import PEER, AttentionProblem, Choice, choices_beside_peer
from bench.common.ranks import all_ranks, dtype_of, run_on_ranks
from lhcp.comm.mesh import Ranks
from lhcp.layer.plan import choose_backend
from lhcp.measure.rank_values import barrier, slowest
from lhcp.measure.runs import Recorder, Runner, take_sample
from lhcp.measure.timings import PHASES, Timing
from lhcp.ring.rotation import NAMES

Row = dict[str, Any]


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--rotations", nargs="*", default=["auto"], choices=("auto", *NAMES))
    parser.add_argument("--seqlens", type=int, nargs="*", default=[65_536])
    add_ranks(parser)
    backend_help = "of ours, beside flash_attn if it is here"
    parser.add_argument("--backend", default="auto", help=backend_help)
    parser.add_argument("--nodes", type=int, default=1, help="outer axis of a mesh of two axes")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--calls", type=int, default=0, help="in a row; 0: 3 on a GPU, else 1")
    parser.add_argument("--warmup", type=int, default=2)
    return parse(parser)


def ours(choice: Choice) -> Callable[..., Tensor]:
    """Return our ring, (q, k, v) -> out, as a choice has it."""
    return lambda q, k, v: lhcp.ring_attention(q, k, v, **choice.options)


def runner(attend: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Runner:
    """Return a ring, (q, k, v) -> out, on these q, k, v and this gradient of out."""
    *leaves, dout = (x.detach() for x in inputs)
    leaves = [x.requires_grad_() for x in leaves]
    out: list[Tensor] = []

    def forward() -> None:
        out[:] = [attend(*leaves)]

    def backward() -> None:
        torch.autograd.grad(out[0], leaves, dout, retain_graph=True)

    return Runner(forward, backward)


def in_turn(
    runs: list[Runner], device: torch.device, ranks: Ranks, args: argparse.Namespace
) -> list[dict[str, Timing]]:
    """Take seconds by phase of every ring, the slowest rank of each repeat; a collective."""
    spans, calls = Recorder(device), args.calls or (3 if device.type == "cuda" else 1)
    times: list[dict[str, list[float]]] = [{phase: [] for phase in PHASES} for _ in runs]
    for repeat in range(args.warmup + args.repeats):
        for phase in PHASES:
            for run, found in zip(runs, times, strict=True):
                barrier(ranks, device)
                seconds = slowest(take_sample(run, phase, spans, calls).seconds, ranks)
                if repeat >= args.warmup:
                    found[phase].append(seconds)
    return [{phase: Timing.of(s) for phase, s in found.items()} for found in times]


def compare(
    problem: AttentionProblem,
    chosen: list[Choice],
    ranks: Ranks,
    args: argparse.Namespace,
    device: torch.device,
) -> list[Row]:
    """Return a row a ring at one length; "over_peer" is its time over ring-flash-attn's."""
    inputs = problem.own(ranks, device)
    rows = []
    runs = [runner(ours(choice), inputs) for choice in chosen]
    for choice, times in zip(chosen, in_turn(runs, device, ranks, args), strict=True):
        name = choice.backend
        if choice.rotation != PEER:
            name = choose_backend(name, problem.dtype, problem.head_dim, device).name
        row: Row = {"seqlen": problem.seqlen, "rotation": choice.rotation, "backend": name}
        row["ms"] = {phase: 1e3 * times[phase].median for phase in PHASES}
        row["quartiles_ms"] = {p: [1e3 * t.low, 1e3 * t.high] for p, t in times.items()}
        rows.append(row)
    peer = next((row for row in rows if row["rotation"] == PEER), None)
    for row in rows if peer else ():
        assert peer is not None
        row["over_peer"] = {phase: row["ms"][phase] / peer["ms"][phase] for phase in PHASES}
    return rows


def print_rows(rows: list[Row]) -> None:
    for row in rows:
        cells = "".join(f"{phase} {row['ms'][phase]:10.3f}   " for phase in PHASES)
        ratio = row.get("over_peer")
        over = f"over {PEER}: {ratio['forward']:.3f}, both {ratio['both']:.3f}" if ratio else ""
        name = f"{row['rotation']} {row['backend']}"
        print(f"S={row['seqlen']:>9,} {name:<28} ms {cells}{over}", flush=True)


def measure(args: argparse.Namespace, device: torch.device) -> None:
    """Print the card, pass the gate, print the table."""
    nodes = all_ranks(device, args.nodes, must_divide=False)
    facts = shown_card(device, nodes)
    like = AttentionProblem.of(args, dtype_of(args.dtype, device))
    q = torch.empty(1, 1, args.heads, args.head_dim, dtype=like.dtype, device=device)
    chosen, missing = choices_beside_peer(nodes, q, args.backend, args.rotations)
    for choice in chosen:
        refuse(choice.rotation, gate(choice, like, device))
    rows: list[Row] = []
    document = {"card": facts, "rows": rows, "peer_missing": missing}
    for seqlen in args.seqlens:
        problem = replace(like, seqlen=seqlen)
        rows += compare(problem, chosen, Ranks(nodes.flat), args, device)
        if nodes.rank == 0:
            print_rows(rows[-len(chosen) :])
            # A run that is cut off leaves what it had.
            write(document, args.json)
    if nodes.rank == 0:
        if missing:
            print(f"not timed: {missing}")
        last_line(document, args.json)


if __name__ == "__main__":
    run_on_ranks(measure, arguments())
