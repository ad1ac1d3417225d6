"""Do both stages of training run over a slow network between nodes, and does the loss fall?

    python -m tests.evidence.netns_train --out bench/results/netns_train_DATE   # dp 4 x cp 8

Four nodes of eight gloo ranks under one torchrun do both stages of training, and the loss must fall
in each. Nodes are network namespaces of this machine: bench/rotation/namespaces.py says what they
need. Ends with status 1, naming what does not hold.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from bench.common.arguments import make_parser
from bench.common.card import dated_card
from bench.common.page import Page
from bench.rotation.namespaces import NotAllowed, nodes
from lhcp.config import LighthouseConfig
from lhcp.console import escape_unprintable


def falls(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return, by stage, the training loss of its first third of steps and of its last."""
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
    """Do both training stages on four nodes of eight ranks: dp 4 x cp 8, a tiny model."""
    with nodes(4) as network, tempfile.TemporaryDirectory() as folder:
        arguments = (
            *("-m", "lhcp", "train", "tiny", "--cp", "8", "--seqlen", "1024"),
            *("--global-batch", "4", "--lighthouse.num-strata", "16", "--lighthouse.topk", "32"),
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
        numbers = ["-" if row[x] is None else f"{row[x]:.3f}" for x in ("before", "after")]
        verdict = "falls" if row["ok"] else "DOES NOT FALL"
        page.row(row["stage"], row["steps"], *numbers, f"{row['seconds']:.1f}", verdict)
        if not row["ok"]:
            page.wrong.append(f"the loss of the {row['stage']} stage does not fall")
    switch = report["switch"]
    page.line("")
    page.line(
        f"Held-out loss in dense mode: {switch['dense']:.3f} at the switch, {switch['final']:.3f} "
        f"at the end; {switch['lighthouse']:.3f} at the switch in lighthouse mode."
    )
    return [{"losses": rows, "node_0_sent_bytes": sent, "report": report}]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--timeout", type=float, default=1200, help="seconds of the torchrun")
    parser.add_argument("--steps", type=int, default=10, help="of each training stage")
    parser.add_argument("--out", help="write <out>.md and <out>.json")
    args = parser.parse_args()
    ranks = "32, gloo; dp 4 x cp 8; 4 network namespaces of one machine, not shaped"
    facts = dated_card(torch.device("cpu"), ranks=ranks, sizes="recipe tiny, rotation auto")
    page = Page("Both training stages on four nodes of eight ranks", facts)
    try:
        records = train(page, args)
    except NotAllowed as error:
        sys.exit(f"network namespaces are not possible here: {error}")
    page.close(args.out, records)


if __name__ == "__main__":
    escape_unprintable()
    main()
