"""Predict what context parallelism costs; with ranks, measure it after; draw curves to 1M tokens.

    python bench/scaling_model.py --out bench/results/scaling_model        # curves for 32 B200s
    python bench/scaling_model.py --calibration mine.json
    torchrun --nproc-per-node 2 bench/scaling_model.py --measure --seqlens 4096 --heads 4

The curves: one layer's forward + backward at the paper's 1M-token setting (L=4, p=4, k=4096), with
context parallelism of 8 inside nodes (and dp 4) and of 32 across them, dense beside lighthouse;
what the rotation adds to one device's time over W; the memory of a rank. The last line is JSON.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from calibrate import calibrate
from harness import card, gate, join, last_line, print_card, run_to_exit

from lhcp.comm.mesh import Ranks
from lhcp.config import LighthouseConfig
from lhcp.cost.calibration import CALIBRATIONS, Calibration
from lhcp.cost.clocks import Sizes
from lhcp.cost.cost_model import boundary_bytes, choose, predict, rotation_memory
from lhcp.measure import measure_overhead

Row = dict[str, Any]

# The paper's decoder: 8 heads of 128; strata for zigzag on up to 32 ranks.
CONFIG = LighthouseConfig(num_levels=4, pool_factor=4, topk=4096, num_strata=64)
HEADS, HEAD_DIM = 8, 128
CP_SIZES = ((8, None), (32, 8))  # (ranks of one sequence, ranks of a node where there are several)


def layer(
    seqlen: int, world_size: int, node_size: int | None, mode: str, calibration: Calibration
) -> Row:
    """Predict one layer's forward + backward on one rank.

    Args:
        seqlen: N. mode: "dense" or "lighthouse".
    """
    entries = seqlen if mode == "dense" else CONFIG.subsequence_length(seqlen)
    sizes = Sizes(
        seqlen=entries,
        world_size=world_size,
        num_heads=HEADS,
        num_kv_heads=HEADS,
        head_dim=HEAD_DIM,
        node_size=node_size,
    )
    rotation, reason = choose(sizes, calibration)
    prediction = predict(rotation, sizes, calibration)
    row = HEADS * HEAD_DIM * sizes.element_bytes
    local, sub = seqlen // world_size, entries // world_size
    seconds = prediction.real
    # q, k, v in and out; saved for the backward: q, k, v, out of the attention, and its lse.
    memory = 8 * local * row + 4 * sub * row + 4 * sub * HEADS
    if mode == "lighthouse":
        # Both directions move each of q, k, v, o once over the tokens and once over the entries.
        seconds += 2 * calibration.copy_seconds(4 * (local + sub) * row)
        link = calibration.inner if node_size is None else calibration.outer
        seconds += 2 * (link.latency + boundary_bytes(sizes, CONFIG.num_levels) / link.bandwidth)
        pyramid = local * 4 // 3
        memory += 3 * (pyramid - local) * row + 4 * HEADS * (sub + pyramid)
    memory += rotation_memory(rotation, sizes)
    sent = prediction.forward.traffic.num_bytes + prediction.backward.traffic.num_bytes
    return {
        "mode": mode,
        "cp": world_size,
        "seqlen": seqlen,
        "subsequence": entries,
        "rotation": rotation,
        "ms": 1e3 * seconds,
        "attention_ms": 1e3 * prediction.real,
        "compute_ms": 1e3 * (prediction.forward.compute + prediction.backward.compute),
        "exposed_ms": 1e3 * (prediction.forward.exposed + prediction.backward.exposed),
        "overhead": prediction.overhead,
        "mb_per_rank": sent / 1e6,
        "memory_gib": memory / 2**30,
        "reason": reason,
    }


def curves(calibration: Calibration) -> list[Row]:
    """All lengths that the config fits, up to 1M tokens."""
    lengths = [2**i for i in range(18, 21)]
    lengths = [n // 2 * 3 // 2 for n in lengths[1:]] + lengths
    return [
        layer(n, cp, node, mode, calibration)
        for mode in ("dense", "lighthouse")
        for cp, node in CP_SIZES
        for n in sorted(lengths)
    ]


def print_curves(rows: list[Row], calibration: Calibration) -> None:
    print(f"{calibration.name}: {calibration.source}")
    head = ("cp", "N", "S", "ms f+b", "exposed ms", "overhead", "MB sent", "GiB/rank")
    print(f"{'mode':<12}{'rotation':<14}" + "".join(f"{h:>11}" for h in head))
    for r in rows:
        cells = (
            str(r["cp"]),
            f"{r['seqlen']:,}",
            f"{r['subsequence']:,}",
            f"{r['ms']:.2f}",
            f"{r['exposed_ms']:.2f}",
            f"{100 * r['overhead']:.1f}%",
            f"{r['mb_per_rank']:.0f}",
            f"{r['memory_gib']:.2f}",
        )
        print(f"{r['mode']:<12}{r['rotation']:<14}" + "".join(f"{c:>11}" for c in cells))


def draw(rows: list[Row], calibration: Calibration, path: str) -> None:
    """Draw time, overhead and memory against N: a line a mode and cp size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4))
    titles = (
        ("ms", "one layer, forward + backward, ms a rank", 1.0),
        ("overhead", "rotation over one device / W, %", 100.0),
        ("memory_gib", "memory of one layer and its rotation, GiB a rank", 1.0),
    )
    styles = {("dense", 8): "C3-o", ("dense", 32): "C3--s"}
    styles |= {("lighthouse", 8): "C0-o", ("lighthouse", 32): "C0--s"}
    for panel, (key, title, factor) in zip(panels, titles, strict=True):
        for (mode, cp), style in styles.items():
            line = [r for r in rows if (r["mode"], r["cp"]) == (mode, cp)]
            label = f"{mode}, " + ("dp 4 x cp 8" if cp == 8 else "cp 32, 4 nodes")
            xs, ys = [r["seqlen"] for r in line], [factor * r[key] for r in line]
            panel.plot(xs, ys, style, label=label, markersize=4)
        panel.set_xscale("log", base=2)
        panel.set_xticks(xs, [f"{x // 1024}K" for x in xs], fontsize=8)
        panel.set_xlabel("tokens of one sequence")
        panel.set_title(title, fontsize=9)
        panel.grid(alpha=0.3)
        if key != "overhead":
            panel.set_yscale("log")
    panels[0].legend(fontsize=8)
    figure.suptitle(f"Predicted, 32 {calibration.name}s; L=4, p=4, k=4096", fontsize=10)
    figure.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    print(f"curves: {path}")


def measure(args: argparse.Namespace, device: torch.device) -> None:
    """Calibrate, predict, then measure, on these ranks; rank 0 prints both."""
    ranks = Ranks(dist.group.WORLD) if dist.get_world_size() > 1 else Ranks()
    shown = ranks.rank == 0
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    facts = card(device, ranks)
    if shown:
        print_card(facts)
    chunks = [n // ranks.world_size // 2 for n in args.seqlens]
    grid = sorted({c for chunk in chunks for c in (chunk, 2 * chunk)})
    calibration = calibrate(
        ranks,
        device,
        dtype,
        heads=args.heads,
        head_dim=args.head_dim,
        seqlens=sorted({*grid, *args.seqlens}),
        queries=grid,
        keys=sorted({c for n in args.seqlens for c in (*grid, n // 2)}),
        nodes=args.nodes,
        large_message=args.large_message,
    )
    records = []
    for rotation in args.rotations:
        heads = (args.heads, args.heads)
        wrong = gate(ranks, device, rotation, "zigzag", dtype, heads, args.head_dim)
        if wrong is not None:
            raise SystemExit(f"{rotation} is wrong, so nothing is timed: {wrong}")
        for seqlen in args.seqlens:
            records.append(compare(args, ranks, device, dtype, rotation, seqlen, calibration))
            if shown:
                print_comparison(records[-1])
    if shown:
        document = {"card": facts, "calibration": json.loads(calibration.text), "records": records}
        last_line(document, None if args.out is None else args.out + ".json")


def compare(
    args: argparse.Namespace,
    ranks: Ranks,
    device: torch.device,
    dtype: torch.dtype,
    rotation: str,
    seqlen: int,
    calibration: Calibration,
) -> Row:
    """Predict, then measure; milliseconds of T, C, M and exposed by direction."""
    sizes = Sizes(
        seqlen=seqlen,
        world_size=ranks.world_size,
        num_heads=args.heads,
        num_kv_heads=args.heads,
        head_dim=args.head_dim,
        element_bytes=dtype.itemsize,
        node_size=None if args.nodes == 1 else ranks.world_size // args.nodes,
    )
    predicted = predict(rotation, sizes, calibration)
    report = measure_overhead(
        None,
        seqlen=seqlen,
        num_heads=args.heads,
        head_dim=args.head_dim,
        dtype=dtype,
        group=ranks,
        rotation=rotation,
        device=device,
        repeats=args.repeats,
        warmup=1,
        single_seconds=args.single_seconds,
    )
    record: Row = {"rotation": rotation, "seqlen": seqlen, "link": asdict(calibration.outer)}
    for phase in ("forward", "backward"):
        guess, found = getattr(predicted, phase), report.phase(phase)
        record[phase] = {
            "bytes": found.bytes_per_rank,
            "predicted": {
                "T": 1e3 * guess.real,
                "C": 1e3 * guess.compute,
                "M": 1e3 * guess.communication,
                "exposed": 1e3 * guess.exposed,
            },
            "measured": {
                "T": 1e3 * found.real.median,
                "C": 1e3 * found.compute.median,
                "M": 1e3 * found.communication.median,
                "exposed": 1e3 * found.exposed,
            },
        }
    return record


def print_comparison(record: Row) -> None:
    print(f"{record['rotation']} S={record['seqlen']:,}   ms: predicted / measured (ratio)")
    for phase in ("forward", "backward"):
        guess, found = record[phase]["predicted"], record[phase]["measured"]
        cells = [
            f"{name} {guess[name]:.2f} / {found[name]:.2f} "
            f"({found[name] / guess[name] if guess[name] > 0 else float('nan'):.2f})"
            for name in guess
        ]
        print(f"  {phase:<9} " + "   ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--calibration", default="B200", help=f"a file, or one of {', '.join(CALIBRATIONS)}"
    )
    parser.add_argument("--inner-gb-s", type=float, help="another rate inside nodes")
    parser.add_argument("--outer-gb-s", type=float, help="another rate between nodes")
    parser.add_argument("--out", help="write <out>.json and <out>.png")
    parser.add_argument("--measure", action="store_true", help="predict and measure these ranks")
    parser.add_argument("--rotations", nargs="*", default=["p2p", "allgather"])
    parser.add_argument("--seqlens", type=int, nargs="*", default=[4096])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--single-seconds", type=float, default=0.0)
    parser.add_argument("--large-message", type=int, help="bytes that the link is measured with")
    args = parser.parse_args()
    if args.measure:
        device = join(args.device)
        run_to_exit(lambda: measure(args, device))
    known = CALIBRATIONS.get(args.calibration)
    calibration = known or Calibration.load(args.calibration)
    for side in ("inner", "outer"):
        rate = getattr(args, f"{side}_gb_s")
        if rate is not None:
            link = replace(getattr(calibration, side), bandwidth=1e9 * rate)
            calibration = replace(calibration, **{side: link})
    rows = curves(calibration)
    print_curves(rows, calibration)
    if args.out:
        draw(rows, calibration, args.out + ".png")
    document = {"calibration": json.loads(calibration.text), "rows": rows}
    last_line(document, None if args.out is None else args.out + ".json")


if __name__ == "__main__":
    main()
