"""A slow network between nodes, on one machine: the model against what messages really cost.

    python bench/netns.py --out bench/results/netns_DATE                 # .md and .json
    python bench/netns.py --train --out bench/results/netns_train_DATE   # dp 4 x cp 8

Without --train: two nodes of one rank, whose links are shaped to rates that make the rotation
communication-bound, balanced and compute-bound; at each the cost model is calibrated and predicts
before it is measured, and the exposed time measured must be 0.8 to 1.25 of that predicted. With
--train: four nodes of eight ranks under one torchrun do both stages of training, and the loss must
fall in each. Nodes are network namespaces: namespaces.py says what they need. Ends with status 1,
naming what does not hold.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from evidence import Page
from namespaces import ROOT, Nodes, NotAllowed, nodes

from lhcp.config import LighthouseConfig

RATIO = (0.8, 1.25)
"""What measured over predicted exposed time must keep to."""
SMALL = 0.03
"""Exposed time that is predicted below this share of T is compared by its difference."""
DIFFERENCE = 0.05
"""The largest such difference, as a share of T."""
REGIMES = ("communication-bound", "balanced", "compute-bound")


def measure(network: Nodes, args: argparse.Namespace, repeats: int) -> dict[str, Any]:
    """Predict and measure on two nodes; the document of bench/scaling_model.py."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (
            *(str(ROOT / "bench/scaling_model.py"), "--measure", "--device", "cpu"),
            *("--nodes", str(len(network.names)), "--rotations", *args.rotations),
            *("--seqlens", str(args.seqlen), "--heads", str(args.heads)),
            *("--head-dim", str(args.head_dim), "--repeats", str(repeats)),
            *("--large-message", str(args.large_message), "--out", f"{folder}/found"),
        )
        network.torchrun(1, arguments, args.timeout)
        document: dict[str, Any] = json.loads(Path(f"{folder}/found.json").read_text())
    return document


def rates(document: dict[str, Any], balance: Sequence[float]) -> list[float]:
    """Megabits a second at which messages alone take `balance` times as long as compute alone."""
    phases = [record[phase] for record in document["records"] for phase in ("forward", "backward")]
    num_bytes = sum(phase["bytes"] for phase in phases)
    seconds = sum(phase["measured"]["C"] for phase in phases) / 1e3
    return [8 * num_bytes / (b * seconds) / 1e6 for b in balance]


def verdicts(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Measured over predicted exposed time, by rotation and direction."""
    found = []
    for record in document["records"]:
        for phase in ("forward", "backward"):
            guess, real = record[phase]["predicted"], record[phase]["measured"]
            small = guess["exposed"] < SMALL * guess["T"]
            ratio = real["exposed"] / guess["exposed"] if guess["exposed"] > 0 else None
            off = (real["exposed"] - guess["exposed"]) / real["T"]
            ok = abs(off) <= DIFFERENCE if small else RATIO[0] <= (ratio or 0.0) <= RATIO[1]
            found.append(
                {
                    "rotation": record["rotation"],
                    "phase": phase,
                    "ratio": ratio,
                    "difference_over_T": off,
                    "small": small,
                    "ok": ok,
                }
            )
    return found


def show(page: Page, name: str, megabits: float | None, document: dict[str, Any]) -> dict[str, Any]:
    """A table of one rate; its rows are held against the bounds if the link is shaped."""
    rate = "not shaped" if megabits is None else f"{megabits:,.0f} Mbit/s"
    link = document["calibration"]["outer"]
    page.table(
        f"{name}: {rate}",
        f"Link as calibrated: {8e-6 * link['bandwidth']:,.0f} Mbit/s, "
        f"{1e3 * link['latency']:.2f} ms. Milliseconds, predicted / measured.",
        (
            *("rotation", "direction", "T", "C", "M", "exposed"),
            *("measured / model", "difference, of T", "verdict"),
        ),
    )
    by_row = [
        (record, phase) for record in document["records"] for phase in ("forward", "backward")
    ]
    said = verdicts(document)
    for (record, phase), verdict in zip(by_row, said, strict=True):
        guess, real = record[phase]["predicted"], record[phase]["measured"]
        ratio = "-" if verdict["ratio"] is None else f"{verdict['ratio']:.2f}"
        what = "ok, small" if verdict["small"] else "ok"
        if megabits is None:
            what = "-"
        elif not verdict["ok"]:
            what = "OFF"
            page.wrong.append(f"{name}, {record['rotation']} {phase}: {ratio}")
        page.row(
            (
                *(record["rotation"], phase),
                *(f"{guess[x]:.1f} / {real[x]:.1f}" for x in ("T", "C", "M", "exposed")),
                *(ratio, f"{verdict['difference_over_T']:.1%}", what),
            )
        )
    return {"name": name, "mbit_s": megabits, "verdicts": said, "document": document}


def compare(page: Page, args: argparse.Namespace) -> list[Any]:
    """As fast as the machine is, for what compute takes, then at three rates."""
    with nodes(2) as network:
        free = measure(network, args, min(args.repeats))
        records = [show(page, "for the rates", None, free)]
        shaped = zip(REGIMES, rates(free, args.balance), args.repeats, strict=True)
        for name, megabits, repeats in shaped:
            network.shape(megabits)
            records.append(show(page, name, megabits, measure(network, args, repeats)))
    page.line("")
    page.line(
        f"ok: the exposed time measured is {RATIO[0]} to {RATIO[1]} of the one predicted; small: "
        f"it is predicted below {SMALL:.0%} of T, and is at most {DIFFERENCE:.0%} of T off."
    )
    return records


def falls(report: dict[str, Any]) -> list[dict[str, Any]]:
    """By stage, the training loss of its first third of steps and of its last."""
    rows = []
    for stage in ("lighthouse", "dense"):
        steps = [step for step in report["history"]["steps"] if step["stage"] == stage]
        losses = [step["loss"] for step in steps]
        third = max(1, len(losses) // 3)
        before, after = (
            fmean(part) if part else None for part in (losses[:third], losses[-third:])
        )
        ok = before is not None and after is not None and after < before
        seconds = sum(step["seconds"] for step in steps)
        rows.append(
            {
                "stage": stage,
                "steps": len(losses),
                "before": before,
                "after": after,
                "seconds": seconds,
                "ok": ok,
            }
        )
    return rows


def train(page: Page, args: argparse.Namespace) -> list[Any]:
    """Both training stages on four nodes of eight ranks: dp 4 x cp 8, a tiny model."""
    with nodes(4) as network, tempfile.TemporaryDirectory() as folder:
        arguments = (
            *("launch/train.py", "tiny", "--cp", "8", "--seqlen", "1024", "--global-batch", "4"),
            *("--lighthouse.num-strata", "16", "--lighthouse.topk", "32"),
            *("--lighthouse-steps", str(args.steps), "--dense-steps", str(args.steps)),
            *("--eval-every", str(args.steps), "--eval-sequences", "4", "--sample-bytes", "0"),
            *("--out", folder),
        )
        before = network.sent_bytes(0)
        network.torchrun(8, arguments, args.timeout)
        sent = network.sent_bytes(0) - before
        report: dict[str, Any] = json.loads(Path(f"{folder}/report.json").read_text())
    run = report["run"]
    config = LighthouseConfig(**run["lighthouse"])
    page.table(
        "Training loss, nats per byte",
        f"N={run['seqlen']:,}, S={config.subsequence_length(run['seqlen'])}. Means over the first "
        f"and the last third of a stage's steps. Node 0 sent {sent / 1e6:,.0f} MB.",
        ("stage", "steps", "first", "last", "s", "verdict"),
    )
    rows = falls(report)
    for row in rows:
        numbers = [f"{row[x]:.3f}" for x in ("before", "after")]
        verdict = "falls" if row["ok"] else "DOES NOT FALL"
        page.row((row["stage"], row["steps"], *numbers, f"{row['seconds']:.1f}", verdict))
        if not row["ok"]:
            page.wrong.append(f"the loss of the {row['stage']} stage does not fall")
    switch = report["switch"]
    page.line("")
    page.line(
        f"Held-out loss in dense mode: {switch['dense']:.3f} at the switch, {switch['final']:.3f} "
        f"at the end; {switch['lighthouse']:.3f} at the switch in lighthouse mode."
    )
    return [{"losses": rows, "node_0_sent_bytes": sent, "report": report}]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rotations", nargs="*", default=["p2p", "allgather"])
    parser.add_argument("--seqlen", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=16)
    parser.add_argument(
        "--repeats",
        type=int,
        nargs=3,
        default=[5, 10, 25],
        help="at each rate: the less is exposed, the more it takes to see it",
    )
    parser.add_argument(
        "--balance", type=float, nargs=3, default=[3.0, 1.0, 0.3], help="M / C of the three rates"
    )
    parser.add_argument("--large-message", type=int, default=2**22)
    parser.add_argument("--timeout", type=float, default=1200, help="seconds of one torchrun")
    parser.add_argument("--train", action="store_true", help="both training stages on 4 x 8 ranks")
    parser.add_argument("--steps", type=int, default=10, help="of each training stage")
    parser.add_argument("--out", help="write <out>.md and <out>.json")
    return parser.parse_args()


def main() -> None:
    args = parse()
    title = "Exposed time against the model, on two nodes at three rates"
    where = "network namespaces of one machine"
    facts = {
        "ranks": f"2, gloo; 2 {where}, shaped by tc tbf",
        "sizes": f"S={args.seqlen:,}, B=1, H=Hk={args.heads}, head_dim {args.head_dim}, float32",
    }
    if args.train:
        title = "Both training stages on four nodes of eight ranks"
        facts = {
            "ranks": f"32, gloo; dp 4 x cp 8; 4 {where}, not shaped",
            "sizes": "recipe tiny, rotation auto",
        }
    page = Page(title, **facts)
    try:
        records = train(page, args) if args.train else compare(page, args)
    except NotAllowed as error:
        sys.exit(f"network namespaces are not possible here: {error}")
    page.close(args.out, records)


if __name__ == "__main__":
    main()
