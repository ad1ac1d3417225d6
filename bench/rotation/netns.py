"""A slow network between nodes, on one machine: the model against what messages really cost.

    python -m bench.rotation.netns --out bench/results/netns_DATE                 # .md and .json
    python -m bench.rotation.netns --nodes 4 --ranks-per-node 2 --heads 4 --head-dim 32 \
        --seqlen 8192 --rotations hierarchical hybrid hybrid_context_first --repeats 5 8 16

Nodes of one rank or several, each with a link of its own to other nodes, shaped to rates that make
rotations communication-bound, balanced and compute-bound. The cost model is calibrated before they
are shaped, and its links again at each rate; then it predicts before it is measured. The exposed
time measured must be 0.8 to 1.25 of that predicted, and where one rotation is predicted to take 10%
less than another, it must take less. Compute of equal calls differs by a tenth and more between two
starts of the same ranks on a machine of shared cores, so each row is held to the model a second
time, with compute as that row measured it. Each rank gets cores of its own where there are four
threads a rank; nothing else should run on them. Nodes are network namespaces: namespaces.py says
what they need. Ends with status 1, naming what does not hold. Training over such nodes is
tests/evidence/netns_train.py.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import torch

from bench.common.arguments import add_heads, make_parser
from bench.common.card import dated_card
from bench.common.page import Page
from bench.rotation.cores import own_cores
from bench.rotation.namespaces import Nodes, NotAllowed, nodes
from lhcp.console import escape_unprintable

RATIO = (0.8, 1.25)
"""What measured over predicted exposed time must keep to."""
SMALL = 0.03
"""Exposed time that is predicted below this share of T is compared by its difference."""
DIFFERENCE = 0.05
"""The largest such difference, as a share of T."""
CLEARLY = 0.1
"""What a rotation must be predicted to be ahead by to be held to it, as a share of its T."""
REGIMES = ("communication-bound", "balanced", "compute-bound")


def measure(
    network: Nodes, args: argparse.Namespace, repeats: int, free: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Predict and measure on these nodes; the document of bench.scaling.

    Args:
        free: that of the links as they were, whose calibration has all but the links.
    """
    with tempfile.TemporaryDirectory() as folder:
        known: tuple[str, ...] = ()
        if free is not None:
            Path(f"{folder}/known.json").write_text(json.dumps(free["calibration"]))
            known = ("--calibrated", f"{folder}/known.json")
        arguments = (
            *("-m", "bench.scaling", "--measure", "--device", "cpu", *known),
            *("--nodes", str(args.nodes), "--rotations", *args.rotations),
            *("--seqlens", str(args.seqlen), "--heads", str(args.heads)),
            *("--head-dim", str(args.head_dim), "--repeats", str(repeats)),
            *("--large-message", str(args.large_message), "--out", f"{folder}/found"),
        )
        network.torchrun(1, arguments, args.timeout)
        document: dict[str, Any] = json.loads(Path(f"{folder}/found.json").read_text())
    return document


def rates(document: dict[str, Any], balance: Sequence[float]) -> list[float]:
    """Return the Mbit/s at which messages alone take `balance` times as long as compute alone."""
    phases = [record[phase] for record in document["records"] for phase in ("forward", "backward")]
    num_bytes = sum(phase["across_bytes"] for phase in phases)
    seconds = sum(phase["measured"]["C"] for phase in phases) / 1e3
    return [8 * num_bytes / (b * seconds) / 1e6 for b in balance]


def verdicts(document: dict[str, Any], by: str = "predicted") -> list[dict[str, Any]]:
    """Judge measured over predicted exposed time, by rotation and direction.

    Args:
        by: "predicted" before, or "with_compute": with compute as it was measured.
    """
    found = []
    for record in document["records"]:
        for phase in ("forward", "backward"):
            guess, real = record[phase][by], record[phase]["measured"]
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


def orders(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Judge, of each two rotations of which one is clearly ahead by the model, whether it is."""

    def both(record: dict[str, Any], what: str) -> float:
        return float(sum(record[phase][what]["T"] for phase in ("forward", "backward")))

    found = []
    for first, second in permutations(document["records"], 2):
        ahead = 1 - both(first, "predicted") / both(second, "predicted")
        if ahead < CLEARLY:
            continue
        really = 1 - both(first, "measured") / both(second, "measured")
        names = {"first": first["rotation"], "second": second["rotation"]}
        found.append({**names, "predicted": ahead, "measured": really, "ok": really > 0})
    return found


def show(page: Page, name: str, megabits: float | None, document: dict[str, Any]) -> dict[str, Any]:
    """Show a table of one rate; its rows are held against the bounds if the link is shaped."""
    rate = "not shaped" if megabits is None else f"{megabits:,.0f} Mbit/s"
    link = document["calibration"]["outer"]
    page.table(
        f"{name}: {rate}",
        f"Link as calibrated: {8e-6 * link['bandwidth']:,.0f} Mbit/s, "
        f"{1e3 * link['latency']:.2f} ms. Milliseconds, predicted / measured; calls: the sum "
        "of each step's slowest rank, without messages / beside them.",
        (
            *("rotation", "direction", "T", "C", "M", "exposed", "calls"),
            *("measured / model", "difference, of T", "verdict"),
            *("with C as measured", "difference, of T", "verdict"),
        ),
    )
    by_row = [
        (record, phase) for record in document["records"] for phase in ("forward", "backward")
    ]
    said, again = verdicts(document), verdicts(document, "with_compute")
    for (record, phase), before, after in zip(by_row, said, again, strict=True):
        guess, real = record[phase]["predicted"], record[phase]["measured"]
        page.row(
            *(record["rotation"], phase),
            *(f"{guess[x]:.1f} / {real[x]:.1f}" for x in ("T", "C", "M", "exposed")),
            " / ".join(f"{ms:.1f}" for ms in real["calls"]),
            *_in_words(before, megabits),
            *_in_words(after, megabits),
        )
        if megabits is not None and not (before["ok"] and after["ok"]):
            ratios = " and ".join(_in_words(one, megabits)[0] for one in (before, after))
            page.wrong.append(f"{name}, {record['rotation']} {phase}: {ratios}")
    ranked = orders(document)
    page.line("")
    for pair in ranked:
        text = f"{pair['first']} before {pair['second']}"
        holds = "" if pair["ok"] else " OFF"
        page.line(
            f"- {text}: {pair['predicted']:.0%} predicted, {pair['measured']:.0%} measured{holds}"
        )
        if megabits is not None and not pair["ok"]:
            page.wrong.append(f"{name}, {text}: {pair['measured']:.0%}")
    return {
        "name": name,
        "mbit_s": megabits,
        "verdicts": said,
        "verdicts_with_compute": again,
        "orders": ranked,
        "document": document,
    }


def _in_words(verdict: dict[str, Any], megabits: float | None) -> tuple[str, str, str]:
    """Return ratio, difference and what they mean; of links that are not shaped nothing."""
    ratio = "-" if verdict["ratio"] is None else f"{verdict['ratio']:.2f}"
    what = "-"
    if megabits is not None:
        what = ("ok, small" if verdict["small"] else "ok") if verdict["ok"] else "OFF"
    return ratio, f"{verdict['difference_over_T']:.1%}", what


def compare(page: Page, args: argparse.Namespace) -> list[Any]:
    """Measure unshaped links, for what compute takes, then links of three rates."""
    with nodes(args.nodes, args.ranks_per_node) as network:
        network.cores = own_cores(args.nodes * args.ranks_per_node)
        free = measure(network, args, min(args.repeats))
        records = [show(page, "for the rates", None, free)]
        shaped = zip(REGIMES, rates(free, args.balance), args.repeats, strict=True)
        for name, megabits, repeats in shaped:
            network.shape(megabits)
            records.append(show(page, name, megabits, measure(network, args, repeats, free)))
    page.line("")
    for what in ("verdicts", "verdicts_with_compute"):
        shown = [one["ok"] for record in records[1:] for one in record[what]]
        how = "with C as measured" if what != "verdicts" else "predicted before"
        page.line(f"{how}: {sum(shown)} of {len(shown)} rows hold.")
    page.line(
        f"ok: the exposed time measured is {RATIO[0]} to {RATIO[1]} of the one predicted; small: "
        f"it is predicted below {SMALL:.0%} of T, and is at most {DIFFERENCE:.0%} of T off."
    )
    return records


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--rotations", nargs="*", default=["p2p", "allgather"])
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--ranks-per-node", type=int, default=1)
    parser.add_argument("--seqlen", type=int, default=32768)
    add_heads(parser, heads=2, head_dim=16)
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
    parser.add_argument("--timeout", type=float, default=1200, help="seconds of one measurement")
    parser.add_argument("--out", help="write <out>.md and <out>.json")
    return parser.parse_args()


def main() -> None:
    args = parse()
    sizes = f"S={args.seqlen:,}, B=1, H=Hk={args.heads}, head_dim {args.head_dim}, float32"
    ranks = (
        f"{args.nodes * args.ranks_per_node}, gloo; {args.nodes} nodes of {args.ranks_per_node} "
        "network namespaces, of one rank each, shaped by tc tbf"
    )
    dealt = own_cores(args.nodes * args.ranks_per_node)
    what = "shared by all ranks" if dealt is None else "; ".join(str(sorted(c)) for c in dealt)
    facts = dated_card(torch.device("cpu"), ranks=ranks, sizes=sizes, hardware_threads=what)
    page = Page("Exposed time against the model, on several nodes at three rates", facts)
    try:
        records = compare(page, args)
    except NotAllowed as error:
        sys.exit(f"network namespaces are not possible here: {error}")
    page.close(args.out, records)


if __name__ == "__main__":
    escape_unprintable()
    main()
