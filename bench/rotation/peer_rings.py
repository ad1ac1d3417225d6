"""Our rotations and ring-flash-attn's zigzag ring in turn, on the same ranks and tensors.

    torchrun --nproc-per-node 8 bench/peer_rings.py --seqlens 65536 131072
    torchrun --nproc-per-node 2 bench/peer_rings.py --device cpu --seqlens 2048 --heads 4 ...

Dense causal attention over S tokens, which is also what the layer does over its sub-sequence. Every
ring runs once in each repeat, after a barrier; a repeat counts its slowest rank; medians. Each ring
is checked against one rank first, and one that is wrong is not timed. Without the package ours are
timed alone. The last line is JSON.
"""

import argparse
from typing import Any

import torch
import torch.distributed as dist
from check_problem import Problem, layout_of
from check_ranks import world
from check_rows import PEER, Choice, choices, peer_missing
from harness import card, gate, join, last_line, print_card, run_to_exit, write
from rates import slowest
from torch import Tensor

import lhcp
from lhcp.comm.mesh import Ranks
from lhcp.measure.report import PHASES, Timing
from lhcp.measure.runs import Recorder, Runner, take
from lhcp.ring.block import choose_block
from lhcp.ring.rotation import NAMES

Row = dict[str, Any]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rotations", nargs="*", default=["auto"], choices=("auto", *NAMES))
    parser.add_argument("--seqlens", type=int, nargs="*", default=[65_536])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="auto", help="auto: bfloat16 on a GPU, else float32")
    parser.add_argument(
        "--backend", default="auto", help="of ours, beside flash_attn if it is here"
    )
    parser.add_argument("--nodes", type=int, default=1, help="outer axis of a mesh of two axes")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--calls", type=int, default=0, help="in a row; 0: 3 on a GPU, else 1")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--json", help="write the JSON document here as well")
    args = parser.parse_args()
    args.kv_heads = args.kv_heads or args.heads
    return args


def runner(choice: Choice, inputs: tuple[Tensor, ...]) -> Runner:
    """One ring on these q, k, v and this gradient of out."""
    *leaves, dout = (x.detach() for x in inputs)
    leaves = [x.requires_grad_() for x in leaves]
    out: list[Tensor] = []

    def forward() -> None:
        out[:] = [lhcp.ring_attention(*leaves, **choice.words)]

    def backward() -> None:
        torch.autograd.grad(out[0], leaves, dout, retain_graph=True)

    return Runner(forward, backward)


def in_turn(
    chosen: list[Choice], inputs: tuple[Tensor, ...], ranks: Ranks, args: argparse.Namespace
) -> list[dict[str, Timing]]:
    """Seconds by phase of every ring, the slowest rank of each repeat; a collective."""
    device = inputs[0].device
    spans, calls = Recorder(device), args.calls or (3 if device.type == "cuda" else 1)
    runs = [runner(choice, inputs) for choice in chosen]
    times: list[dict[str, list[float]]] = [{phase: [] for phase in PHASES} for _ in runs]
    for repeat in range(args.warmup + args.repeats):
        for phase in PHASES:
            for run, found in zip(runs, times, strict=True):
                if ranks.world_size > 1:
                    ids = [device.index] if device.type == "cuda" else None
                    dist.barrier(group=ranks.flat, device_ids=ids)
                seconds = slowest(take(run, phase, spans, calls).seconds, ranks)
                if repeat >= args.warmup:
                    found[phase].append(seconds)
    return [{phase: Timing.of(s) for phase, s in found.items()} for found in times]


def compare(
    seqlen: int, chosen: list[Choice], ranks: Ranks, device: torch.device, args: argparse.Namespace
) -> list[Row]:
    """A row a ring at one length; "over_peer" is its time over ring-flash-attn's."""
    problem = Problem(
        seqlen=seqlen,
        num_heads=args.heads,
        num_kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        dtype=getattr(torch, args.dtype),
    )
    layout = layout_of(ranks)
    layout.check_seqlen(seqlen)
    inputs = problem.inputs(layout.chunks(ranks.rank), layout.num_chunks, device)
    rows = []
    for choice, times in zip(chosen, in_turn(chosen, inputs, ranks, args), strict=True):
        name = choice.backend
        if choice.rotation != PEER:
            name = choose_block(name, problem.dtype, args.head_dim, device).name
        row: Row = {"seqlen": seqlen, "rotation": choice.rotation, "backend": name}
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
    """Card, gate, table."""
    nodes = world(args, device)
    ranks = Ranks(nodes.flat)
    dtype = getattr(torch, args.dtype)
    facts = card(device, nodes)
    if ranks.rank == 0:
        print_card(facts)
    like = torch.empty(1, 1, args.heads, args.head_dim, dtype=dtype, device=device)
    missing = peer_missing((like, like[:, :, : args.kv_heads]), ranks)
    backends = [args.backend] if missing else [args.backend, "flash_attn"]
    chosen = choices(nodes, args.kv_heads, backends, args.rotations)
    if missing is None:
        chosen.append(Choice(PEER, "auto", ranks))
    heads = (args.heads, args.kv_heads)
    for choice in chosen:
        wrong = gate(
            *(choice.ranks, device, choice.rotation, "zigzag", dtype, heads, args.head_dim),
            backend=choice.backend,
        )
        if wrong is not None:
            raise SystemExit(f"{choice.rotation} is wrong, so nothing is timed: {wrong}")
    rows: list[Row] = []
    document = {"card": facts, "rows": rows, "peer_missing": missing}
    for seqlen in args.seqlens:
        rows += compare(seqlen, chosen, ranks, device, args)
        if ranks.rank == 0:
            print_rows(rows[-len(chosen) :])
            # A run that is cut off leaves what it had.
            write(document, args.json)
    if ranks.rank == 0:
        if missing:
            print(f"not timed: {missing}")
        last_line(document, args.json)


def main() -> None:
    args = parse()
    device = join(args.device)
    if args.dtype == "auto":
        args.dtype = "bfloat16" if device.type == "cuda" else "float32"
    run_to_exit(lambda: measure(args, device))


if __name__ == "__main__":
    main()
