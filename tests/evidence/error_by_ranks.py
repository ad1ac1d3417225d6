"""Does the error against float64 grow with the number of ranks? Dense attention and the layer.

    python bench/error_by_ranks.py --out bench/results/error_by_ranks_cpu_DATE    # .md and .json

gloo ranks on a CPU, zigzag, the `cpu` backend. An error is a distance to the reference in float64
on the same rounded inputs, over the reference's own size, over all seeds together: the l2 norm (the
verdict) and the largest element. The selection is the same on any number of ranks, and checked to
be. Ends with status 1, naming the row, if the error at any number of ranks is above the bound times
the error of one rank.
"""

import argparse
import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean
from typing import Any

import torch
from evidence import Page, equal, together, whole_entries, whole_selection
from torch import Tensor

import lhcp
from lhcp import reference
from lhcp.comm.mesh import Group, Ranks, as_ranks
from lhcp.testing.inputs import qkv
from lhcp.testing.ranks import RankPool

BOUNDS = {"allgather": 1.5, "p2p": 2.0, "hierarchical": 2.0, "alltoall": 1.5}
"""Error of W ranks over that of one; a ring merges in steps, the others attend in one or two."""
TENSORS = ("out", "dq", "dk", "dv")
NUM_NODES = 2
Errors = dict[str, tuple[float, float]]
"""By tensor: relative l2 error, relative largest error."""


@dataclass(frozen=True)
class Setting:
    """One computation: dense attention, or the layer if there is a config."""

    seqlen: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    seed: int
    config: lhcp.LighthouseConfig | None = None


@lru_cache(maxsize=1)
def inputs(setting: Setting) -> tuple[Tensor, ...]:
    """q, k, v and the output's gradient of the whole sequence."""
    return qkv(
        setting.seqlen,
        num_heads=setting.heads,
        head_dim=setting.head_dim,
        dtype=setting.dtype,
        seed=setting.seed,
    )


def answer(group: Group | Ranks, setting: Setting, rotation: str) -> Any:
    """One rank's out, dq, dk, dv, and its entries in the whole sequence, if it selects."""
    ranks, config = as_ranks(group), setting.config
    q, k, v, dout = (lhcp.shard(x, ranks) for x in inputs(setting))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    choices = {"group": ranks, "rotation": rotation, "backend": "cpu"}
    entries = None
    if config is None:
        out = lhcp.ring_attention(q, k, v, **choices)
    else:
        selection = lhcp.select(q, k, config=config, group=ranks)
        entries = whole_entries(selection, config, setting.seqlen, ranks)
        out = lhcp.lighthouse_attention(q, k, v, config=config, selection=selection, **choices)
    return (out.detach(), *torch.autograd.grad(out, leaves, dout)), entries


def exact(setting: Setting, selection: reference.ReferenceSelection | None) -> tuple[Tensor, ...]:
    """The reference's out, dq, dk, dv in float64."""
    q, k, v, dout = (x.double() for x in inputs(setting))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    if setting.config is None:
        out = reference.causal_attention(q, k, v)
    else:
        out = reference.lighthouse_attention(q, k, v, config=setting.config, selection=selection)
    return (out.detach(), *torch.autograd.grad(out, leaves, dout))


def errors(ours: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> Errors:
    """Relative errors of out, dq, dk, dv; infinite where an element is not a number."""
    found = {}
    for name, got, want in zip(TENSORS, ours, truth, strict=True):
        off = (got.double() - want).nan_to_num(nan=math.inf)
        largest = off.abs().max() / want.abs().max()
        found[name] = ((off.norm() / want.norm()).item(), largest.item())
    return found


def measure(
    pool: RankPool, args: argparse.Namespace, setting: Setting, page: Page
) -> dict[tuple[str, int], Errors]:
    """Errors by (rotation, W); W = 1 under every rotation's name."""
    ours, entries = answer(None, setting, "auto")
    selection = None if entries is None else whole_selection([entries])
    truth = exact(setting, selection)
    one = errors(ours, truth)
    found = {}
    for rotation in args.rotations:
        found[rotation, 1] = one
        for world in args.ranks:
            if rotation == "alltoall" and setting.heads % world:
                continue
            nodes = NUM_NODES if rotation == "hierarchical" else None
            parts = pool.run(answer, world, setting, rotation, num_nodes=nodes)
            whole = tuple(together(x, 1) for x in zip(*(part for part, _ in parts), strict=True))
            found[rotation, world] = errors(whole, truth)
            if selection is not None:
                chosen = whole_selection([entries for _, entries in parts])
                if not equal(chosen, selection):
                    page.wrong.append(f"{rotation}, W={world}: other entries than on one rank")
    return found


def pooled(by_seed: list[tuple[float, float]]) -> tuple[float, float]:
    """Both errors of all seeds together."""
    norms, largest = zip(*by_seed, strict=True)
    return math.sqrt(fmean(norm**2 for norm in norms)), max(largest)


def tables(
    page: Page, args: argparse.Namespace, title: str, by_seed: list[dict[tuple[str, int], Errors]]
) -> list[Any]:
    """Both tables of one computation in one dtype; the l2 one is held against the bounds."""
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
                page.row((rotation, tensor, *cells))
                record = {"computation": title, "rotation": rotation, "tensor": tensor}
                records.append(record | {"error": what, "by_ranks": errors, "ratio": ratio})
    return records


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4, 8, 16], help="beside one")
    parser.add_argument("--rotations", nargs="*", default=list(BOUNDS), choices=list(BOUNDS))
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--seqlen", type=int, default=2048, help="of dense attention")
    parser.add_argument("--layer-seqlen", type=int, default=8192, help="tokens of the layer")
    parser.add_argument("--topk", type=int, default=128)
    parser.add_argument("--strata", type=int, default=32)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", help="write <out>.md and <out>.json")
    return parser.parse_args(arguments)


def report(args: argparse.Namespace, pool: RankPool) -> None:
    """Measure and print everything; ends the program with status 1 if a row does not hold."""
    config = lhcp.LighthouseConfig(
        num_levels=3, pool_factor=4, topk=args.topk, num_strata=args.strata
    )
    entries = config.subsequence_length(args.layer_seqlen)
    kinds = {
        f"dense, S={args.seqlen:,}": (args.seqlen, None),
        f"layer, N={args.layer_seqlen:,}, S={entries:,}": (args.layer_seqlen, config),
    }
    page = Page(
        "Error against float64 by number of ranks",
        ranks=f"gloo, W = 1, {', '.join(map(str, args.ranks))}; hierarchical on {NUM_NODES} nodes",
        sizes=f"B=1, H=Hk={args.heads}, head_dim {args.head_dim}, zigzag, backend cpu, {config}",
    )
    records = []
    for dtype in args.dtypes:
        for kind, (seqlen, config_of_kind) in kinds.items():
            sizes = (seqlen, args.heads, args.head_dim, getattr(torch, dtype))
            by_seed = [
                measure(pool, args, Setting(*sizes, seed, config_of_kind), page)
                for seed in range(args.seeds)
            ]
            records += tables(page, args, f"{dtype}, {kind}", by_seed)
    page.close(args.out, records)


def main() -> None:
    args = parse()
    pool = RankPool(max(args.ranks), timeout=600)
    try:
        report(args, pool)
    finally:
        pool.close()


if __name__ == "__main__":
    main()
