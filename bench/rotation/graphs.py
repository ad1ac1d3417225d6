"""What the host costs a layer on these ranks: launched call by call, and as CUDA graphs.

    torchrun --nproc-per-node 2 -m bench.rotation.graphs --seqlens 32768 98304
    python -m bench.rotation.graphs --modes lighthouse dense

Forward and backward of one layer, in a row of calls after a barrier; a repeat counts its slowest
rank; medians. Graphs are lhcp.graphed's, copies of inputs and gradients included; how far they are
from the call on fresh inputs is beside them. "over one / W" holds a time against the same call on
one rank with the whole sequence, over W. The last line is JSON.
"""

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

import lhcp
from bench.common.arguments import add_layer, add_ranks, config_of, make_parser, parse
from bench.common.card import shown_card
from bench.common.page import last_line, write
from bench.common.ranks import all_ranks, dtype_of, run_on_ranks
from lhcp.comm.mesh import Ranks
from lhcp.layer.module import LighthouseAttention
from lhcp.layer.recording import CALLS_BEFORE
from lhcp.measure.clock import elapsed
from lhcp.measure.rank_values import barrier, slowest
from lhcp.ring.rotation import NAMES

Row = dict[str, Any]


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--seqlens", type=int, nargs="*", default=[32_768])
    parser.add_argument("--modes", nargs="*", default=["lighthouse"])
    parser.add_argument("--rotations", nargs="*", default=["p2p"], choices=("auto", *NAMES))
    add_layer(parser, topk=1536)
    add_ranks(parser)
    parser.add_argument("--nodes", type=int, default=1, help="the outer of two axes")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--calls", type=int, default=10, help="in a row")
    return parse(parser)


def draw(args: argparse.Namespace, tokens: int, seed: int, device: torch.device) -> list[Tensor]:
    """Return q, k, v and the gradient of the output of one rank."""
    generator = torch.Generator(device).manual_seed(seed)
    heads = (args.heads, args.kv_heads or args.heads, args.kv_heads or args.heads, args.heads)
    made = (
        torch.randn(
            (1, tokens, h, args.head_dim),
            generator=generator,
            device=device,
            dtype=dtype_of(args.dtype, device),
        )
        for h in heads
    )
    return [x.requires_grad_(i < 3) for i, x in enumerate(made)]


def step(layer: LighthouseAttention, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Return a layer's output and gradients."""
    *leaves, dout = inputs
    out = layer(*leaves)
    return out, *torch.autograd.grad(out, leaves, dout)


def make(args: argparse.Namespace, mode: Any, rotation: str, ranks: Ranks) -> LighthouseAttention:
    """Return a layer in a mode."""
    layer = LighthouseAttention(
        config_of(args),
        ranks,
        rotation=rotation if ranks.world_size > 1 else "auto",
        backend=args.backend,
    )
    layer.mode = mode
    return layer


def distance(layer: LighthouseAttention, by_graph: LighthouseAttention, inputs: Any) -> float:
    """Return how far a graph's output and gradients are from the call's, largest relative l2.

    On inputs that it was not recorded with. Not 0 where a backend adds in no fixed order.
    """
    for seed in range(CALLS_BEFORE + 1):
        step(by_graph, inputs(seed))
    fresh = inputs(99)
    pairs = zip(step(layer, fresh), step(by_graph, fresh), strict=True)
    return max(float((a.float() - b.float()).norm() / a.float().norm()) for a, b in pairs)


def timed(
    run: Callable[[], Any], ranks: Ranks, device: torch.device, args: argparse.Namespace
) -> float:
    """Return ms of a call in a row of them, the slowest rank's; a collective."""
    found = []
    for _ in range(args.repeats + 2):
        barrier(ranks, device)
        found.append(1e3 * slowest(elapsed(run, device, args.calls), ranks))
    return median(found[2:])


def compare(
    args: argparse.Namespace,
    seqlen: int,
    mode: str,
    rotation: str,
    ranks: Ranks,
    device: torch.device,
) -> Row:
    """Return one row; a collective."""
    row: Row = {"seqlen": seqlen, "mode": mode, "rotation": rotation, "ranks": ranks.world_size}
    alone = ranks.world_size == 1
    for name, these, tokens in (
        ("", ranks, seqlen // ranks.world_size),
        *(() if alone else (("one_", Ranks(), seqlen),)),
    ):
        layer, by_graph = (make(args, mode, rotation, these) for _ in range(2))
        graphs = lhcp.graphed([by_graph], always=True)

        def inputs(seed: int, tokens: int = tokens) -> list[Tensor]:
            return draw(args, tokens, 100 * seed + ranks.rank, device)

        far = distance(layer, by_graph, inputs)
        given = inputs(7)
        for kind, one in (("eager", layer), ("graph", by_graph)):
            run = partial(step, one, given)
            row[f"{name}{kind}_ms"] = timed(run, ranks, device, args)
        row[f"{name}distance"], row[f"{name}without"] = far, dict(graphs.eager)
        graphs.release()
    if not alone:
        ideal = row["one_graph_ms"] / ranks.world_size
        row["eager_over_ideal"] = row["eager_ms"] / ideal
        row["graph_over_ideal"] = row["graph_ms"] / ideal
    return row


def measure(args: argparse.Namespace, device: torch.device) -> None:
    """Print the card and a row a length, mode and rotation."""
    ranks = all_ranks(device, args.nodes)
    document: dict[str, Any] = {"card": shown_card(device, ranks), "rows": []}
    for seqlen in args.seqlens:
        for mode in args.modes:
            for rotation in args.rotations if ranks.world_size > 1 else ["none"]:
                row = compare(args, seqlen, mode, rotation, ranks, device)
                document["rows"].append(row)
                if ranks.rank == 0:
                    over = row.get("graph_over_ideal")
                    print(
                        f"N={seqlen:,} {mode} {rotation}: eager {row['eager_ms']:.3f} ms, graph "
                        f"{row['graph_ms']:.3f} ms, distance {row['distance']:.1e}"
                        + (f", graph over one / W {over:.3f}" if over else ""),
                        flush=True,
                    )
                    write(document, args.json)
    if ranks.rank == 0:
        last_line(document, args.json)


if __name__ == "__main__":
    run_on_ranks(measure, arguments())
