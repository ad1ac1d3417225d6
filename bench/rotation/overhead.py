"""What the rotation costs: the real thing beside its twins, on these ranks.

    torchrun --nproc-per-node 4 bench/overhead.py --rotations p2p allgather --seqlens 65536
    torchrun --nnodes 2 ... bench/overhead.py --nodes 2 --rotations hierarchical --topk 4096 ...
    python bench/overhead.py --simulate-ranks 8 --seqlens 65536     # one device, ranks in turn

Checks each rotation against one rank first, and prints no time of one that is wrong. With --topk
--seqlens are tokens of the layer, else tokens of dense attention. The last line is JSON.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness import backends, card, gate, join, last_line, print_card, run_to_exit, write
from in_turn import check, in_turn
from torch.distributed.device_mesh import init_device_mesh

from lhcp.comm.layout import LAYOUTS
from lhcp.comm.mesh import Ranks, as_ranks
from lhcp.config import LighthouseConfig
from lhcp.measure import Mark, OverheadReport, measure_overhead
from lhcp.ring.rotation import NAMES


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = ("auto", *NAMES)
    parser.add_argument("--rotations", nargs="*", default=["p2p", "allgather"], choices=known)
    parser.add_argument("--seqlens", type=int, nargs="*", default=[8192])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="auto", help="auto: bfloat16 on a GPU, else float32")
    parser.add_argument("--layout", default="zigzag", choices=LAYOUTS)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--topk", type=int, help="measure a lighthouse layer with this topk")
    parser.add_argument("--levels", type=int, default=3)
    parser.add_argument("--factor", type=int, default=4)
    parser.add_argument("--strata", type=int, default=16)
    parser.add_argument("--nodes", type=int, default=1, help="outer axis of a mesh of two axes")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--calls", type=int, help="calls in a row that one measurement times")
    parser.add_argument("--single-seconds", type=float, default=10.0, help="the most T1 may take")
    parser.add_argument("--simulate-ranks", type=int, help="ranks in turn on one device")
    parser.add_argument("--png", help="write a timeline of the last measurement here")
    parser.add_argument("--json", help="write the JSON document here as well")
    args = parser.parse_args()
    args.kv_heads = args.kv_heads or args.heads
    if args.simulate_ranks and args.nodes == 1 and "hierarchical" in args.rotations:
        parser.error("hierarchical needs --nodes 2 or more")
    return args


def config_of(args: argparse.Namespace) -> LighthouseConfig | None:
    """The layer's config, if one was asked for."""
    if args.topk is None:
        return None
    return LighthouseConfig(
        num_levels=args.levels,
        pool_factor=args.factor,
        topk=args.topk,
        num_strata=args.strata,
    )


def world(args: argparse.Namespace, device: torch.device) -> Ranks:
    """All ranks, as a mesh of two axes with --nodes."""
    size = dist.get_world_size()
    if size == 1:
        return Ranks()
    if args.nodes == 1:
        return Ranks(dist.group.WORLD)
    if size % args.nodes:
        raise SystemExit(f"--nodes {args.nodes} does not divide {size} ranks")
    mesh = init_device_mesh(
        device.type, (args.nodes, size // args.nodes), mesh_dim_names=("node", "local")
    )
    return as_ranks(mesh)


def measure(args: argparse.Namespace, device: torch.device) -> None:
    """Card, gate, tables, timeline, JSON; the same work on every rank, printed by rank 0."""
    ranks = world(args, device)
    shown = ranks.rank == 0
    dtype = getattr(torch, args.dtype)
    facts = card(device, ranks)
    if shown:
        print_card(facts)
    reports: list[OverheadReport] = []
    document: dict[str, Any] = {"card": facts, "reports": []}
    for rotation in args.rotations:
        heads = (args.heads, args.kv_heads)
        wrong = gate(
            ranks, device, rotation, args.layout, dtype, heads, args.head_dim, args.backend
        )
        if wrong is not None:
            raise SystemExit(f"{rotation} is wrong, so nothing is timed: {wrong}")
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


_COLOURS = {"compute": "#4477aa", "wait": "#cc3311", "message": "#ddaa33"}


def draw(report: OverheadReport, path: str) -> None:
    """Draw ranks x time: each rank's compute and waits, and under them its messages alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    setting = report.setting
    size = setting["world_size"]
    figure, axes = pyplot.subplots(figsize=(11, 1.2 + 0.7 * size))

    def bar(mark: Mark, height: float, colour: str) -> None:
        width = 1e3 * (mark.stop - mark.start)
        axes.barh(
            mark.rank + height, width, 0.35, 1e3 * mark.start, color=colour, edgecolor="white"
        )
        if mark.kind == "compute" and size <= 16:
            middle = 1e3 * (mark.start + mark.stop) / 2
            axes.text(
                middle, mark.rank + height, str(mark.step), ha="center", va="center", fontsize=7
            )

    # Compute last: on a GPU it goes on in other streams while one waits, and covers that.
    for mark in sorted(report.timeline, key=lambda m: m.kind, reverse=True):
        if mark.variant == "real":
            bar(mark, -0.2, _COLOURS[mark.kind])
        elif mark.kind == "wait":
            bar(mark, 0.2, _COLOURS["message"])
    axes.set_yticks(range(size), [f"rank {rank}" for rank in range(size)])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("ms since the barrier")
    axes.set_title(
        f"{setting['rotation']}, S={setting['subsequence']:,}, forward + backward, "
        f"{setting['device']}: upper bar the run, lower bar its messages alone",
        fontsize=9,
    )
    labels = ("compute, by step", "waiting for messages", "messages alone (the twin)")
    axes.legend(
        [Patch(color=c) for c in _COLOURS.values()],
        labels,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.5 / (0.7 * size)),
        ncols=3,
        fontsize=8,
        frameon=False,
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    print(f"timeline: {path}")


def simulate(args: argparse.Namespace) -> None:
    """Ranks in turn on one device, without messages."""
    use_gpu = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", 0) if use_gpu else torch.device("cpu")
    facts: dict[str, Any] = card(device, Ranks()) | {"ranks in turn": args.simulate_ranks}
    print_card(facts)
    dtype = getattr(torch, args.dtype if args.dtype != "auto" else _default_dtype(device))
    kernels = backends(dtype, args.head_dim, device)
    rows = []
    for rotation in args.rotations:
        check(args, rotation, device, dtype)
        for seqlen in args.seqlens:
            row = in_turn(args, config_of(args), rotation, seqlen, device, dtype, kernels, facts)
            rows.append(row)
    last_line({"card": facts, "in_turn": rows}, args.json)


def _default_dtype(device: torch.device) -> str:
    return "bfloat16" if device.type == "cuda" else "float32"


def main() -> None:
    args = parse()
    if args.simulate_ranks:
        simulate(args)
        return
    device = join(args.device)
    if args.dtype == "auto":
        args.dtype = _default_dtype(device)
    run_to_exit(lambda: measure(args, device))


if __name__ == "__main__":
    main()
