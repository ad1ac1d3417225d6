"""What the host costs a layer on these ranks: launched call by call, and as CUDA graphs.

    torchrun --nproc-per-node 2 -m bench.rotation.graphs --seqlens 32768 98304
    python -m bench.rotation.graphs --modes lighthouse dense

Forward and backward of one layer, in a row of calls after a barrier; a repeat counts its slowest
rank; medians. Graphs are lhcp.graphed's, copies of inputs and gradients included; how far they are
from the call on fresh inputs is beside them. "over one / W" holds a time against the same call on
one rank with the whole sequence, over W. A calibration's word is beside it: of `lhcp calibrate` on
these ranks, or built in. The last line is JSON.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor

import lhcp
from bench.common.arguments import add_layer, add_ranks, config_of, make_parser, parse
from bench.common.card import shown_card
from bench.common.page import last_line, write
from bench.common.ranks import all_ranks, dtype_of, run_on_ranks
from bench.rotation.predict_rows import on_one_host
from bench.scaling.layer import Question
from bench.scaling.layer import layer as layer_of
from lhcp.comm.mesh import Ranks
from lhcp.cost.tables import CALIBRATIONS, read_or_built_in
from lhcp.layer.graphs import CALLS_BEFORE
from lhcp.layer.module import LighthouseAttention
from lhcp.measure.clock import elapsed
from lhcp.measure.rank_values import barrier, slowest
from lhcp.ring.rotation import NAMES

Row = dict[str, Any]
LONG = 100.0
"""ms that a row of calls need not be longer than: what their start costs is lost in them."""


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
    parser.add_argument("--calls", type=int, default=10, help="in a row, where they are short")
    parser.add_argument(
        "--calibration", help=f"to predict by: a file, or one of {', '.join(CALIBRATIONS)}"
    )
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
    calls = (step(one, fresh) for one in (layer, by_graph))
    pairs = [[x.detach().float() for x in pair] for pair in zip(*calls, strict=True)]
    return max(float((a - b).norm() / a.norm()) for a, b in pairs)


def timed(
    run: Callable[[], Any], ranks: Ranks, device: torch.device, args: argparse.Namespace
) -> float:
    """Return ms of a call in a row of them, the slowest rank's; a collective."""
    found, calls = [], 1
    for _ in range(args.repeats + 2):
        barrier(ranks, device)
        found.append(1e3 * slowest(elapsed(run, device, calls), ranks))
        calls = max(1, min(args.calls, round(LONG / found[-1])))
    return median(found[2:])


def times(
    args: argparse.Namespace,
    seqlen: int,
    mode: str,
    rotation: str,
    ranks: Ranks,
    device: torch.device,
) -> Row:
    """Return a layer's times on these ranks, measured and predicted; a collective."""
    row: Row = {"seqlen": seqlen, "mode": mode, "rotation": rotation, "ranks": ranks.world_size}
    layer, by_graph = (make(args, mode, rotation, ranks) for _ in range(2))
    graphs = lhcp.graphed([by_graph], always=True)

    def inputs(seed: int) -> list[Tensor]:
        return draw(args, seqlen // ranks.world_size, 100 * seed + ranks.rank, device)

    row["distance"] = distance(layer, by_graph, inputs)
    given = inputs(7)
    for kind, one in (("eager", layer), ("graph", by_graph)):
        row[f"{kind}_ms"] = timed(partial(step, one, given), ranks, device, args)
    row["without"] = dict(graphs.eager)
    graphs.release()
    if args.calibration and rotation != "auto":
        row |= predicted(args, seqlen, mode, rotation, ranks)
    return row


def predicted(args: argparse.Namespace, seqlen: int, mode: str, rotation: str, ranks: Ranks) -> Row:
    """Return what the cost model says of a layer, all ranks on one host: eager_, graph_predicted.

    With a graph's own copies: of q, k, v and the gradient of the output, and of dq, dk, dv.
    """
    table = on_one_host(read_or_built_in(args.calibration))
    config, world = config_of(args), ranks.world_size
    assert config is not None
    sizes = {"config": config, "heads": args.heads, "head_dim": args.head_dim}
    asked = Question(mode, seqlen, world, table, node=ranks.node_size or world, **sizes)
    in_graph = replace(asked, calibration=table.in_graphs())
    row = args.heads * args.head_dim * dtype_of(args.dtype, torch.device("cuda")).itemsize
    copies = 7e3 * table.copy_seconds(2 * seqlen // world * row)
    return {
        "eager_predicted": layer_of(asked, rotation)["ms"],
        "graph_predicted": layer_of(in_graph, rotation)["ms"] + copies,
    }


def told(row: Row) -> str:
    """Return a row in words."""
    text = f"N={row['seqlen']:,} {row['mode']} {row['rotation']} on {row['ranks']}:"
    for kind in ("eager", "graph"):
        text += f" {kind} {row[f'{kind}_ms']:.3f} ms"
        if f"{kind}_predicted" in row:
            text += f" (predicted {row[f'{kind}_predicted']:.3f})"
    if "graph_over_ideal" in row:
        text += f", graph over one / W {row['graph_over_ideal']:.3f}"
    return f"{text}, distance {row['distance']:.1e}"


def measure(args: argparse.Namespace, device: torch.device) -> None:
    """Print the card and a row a length, mode and rotation, those of one rank first."""
    ranks = all_ranks(device, args.nodes)
    world = ranks.world_size
    document: dict[str, Any] = {"card": shown_card(device, ranks), "rows": []}
    for seqlen, mode in product(args.seqlens, args.modes):
        one = times(args, seqlen, mode, "p2p", Ranks(), device)
        rows = [one | {"rotation": "none"}]
        for rotation in args.rotations if world > 1 else ():
            row = times(args, seqlen, mode, rotation, ranks, device)
            for kind in ("eager", "graph"):
                row[f"{kind}_over_ideal"] = row[f"{kind}_ms"] / (one["graph_ms"] / world)
            rows.append(row)
            if ranks.rank == 0:
                print(told(row), flush=True)
        document["rows"] += rows
        if ranks.rank == 0:
            print(told(rows[0]), flush=True)
            write(document, args.json)
    if ranks.rank == 0:
        last_line(document, args.json)


if __name__ == "__main__":
    run_on_ranks(measure, arguments())
