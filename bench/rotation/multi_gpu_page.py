"""One page and one JSON file from what the steps of bench/rotation/multi_gpu.sh left behind.

    python -m bench.rotation.multi_gpu_page --work FOLDER --out FOLDER

Reads steps.tsv (name, state, seconds) and a JSON document a step; writes multi_gpu.md and
multi_gpu.json. Steps that did not run, or left no document, are named and no more. Made again
after every step, so that a call that is cut off leaves what it had. The last line is JSON.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.common.arguments import make_parser
from bench.common.page import Page, last_line, today, write
from bench.common.problem import TENSORS
from lhcp.console import escape_unprintable
from lhcp.page import write_page

SHOWN_PHASES = ("forward", "both")
Document = dict[str, Any]


def read(work: Path) -> tuple[list[list[str]], dict[str, Document]]:
    """Return steps in the order in which they ran, and their documents by name."""
    steps = [line.split("\t") for line in (work / "steps.tsv").read_text().splitlines()]
    documents = {}
    for name, *_ in steps:
        path = work / f"{name}.json"
        if path.exists():
            documents[name] = json.loads(path.read_text())
    return steps, documents


def number(value: float | None, form: str = ".3f", factor: float = 1.0) -> str:
    return "-" if value is None else f"{factor * value:{form}}"


def correctness(page: Page, documents: Mapping[str, Document]) -> None:
    """Show what was compared and how far apart it is, a row a way to attend."""
    found = [documents[name] for name in ("check_small", "check_long") if name in documents]
    rows = [row for document in found for row in document["rows"]]
    # Both documents hold rank 0 against float64.
    checked = {title(row): row for row in rows if row["check"] != "peer"}.values()
    if checked:
        page.table(
            "Correctness: relative l2 distances, forward and backward",
            '"float64" and "compiled": to the reference in float64, judged by the error budget.\n'
            '"one rank": to rank 0 alone; at most three times its own error and a rounding.\n'
            "Selections are equal bit for bit, or the row is wrong.",
            ("against", "what", "rotation", "backend", *TENSORS, ""),
        )
    for row in checked:
        errors = (number(row.get("error", {}).get(name), ".2e") for name in TENSORS)
        page.row(row["check"], *attended(row), *errors, row["wrong"] or "right")
    peers = [row for row in rows if row["check"] == "peer"]
    if peers:
        header = ("what", "rotation", "backend", *TENSORS, "")
        page.table("Our error against float64 over ring-flash-attn's", "", header)
    for row in peers:
        ratios = (number(row["ratio"][name]) for name in TENSORS)
        page.row(*attended(row), *ratios, row["wrong"] or "right")
    if missing := documents.get("check_small", {}).get("peer_missing"):
        page.line(f"\nNot compared: {missing}.")


def attended(row: Document) -> tuple[str, str, str]:
    """Return what was attended to, by which rotation and kernel."""
    took = f" ({row['took']})" if row["took"] != row["rotation"] else ""
    return f"{row['kind']} {row['seqlen']:,}", f"{row['rotation']}{took}", row["backend"]


def title(row: Document) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("check", "kind", "seqlen", "rotation", "backend"))


def pair(predicted: float | None, measured: float | None) -> str:
    """Show predicted / measured milliseconds, and measured over predicted."""
    if predicted is None or measured is None:
        return f"- / {number(measured)}"
    ratio = f" ({measured / predicted:.2f})" if predicted > 0 else ""
    return f"{predicted:.3f} / {measured:.3f}{ratio}"


def overhead(page: Page, documents: Mapping[str, Document]) -> None:
    """Show the rotation's cost beside the model's word, a row a rotation, length and direction."""
    prediction = documents.get("predict", {})
    known = {
        (row["row"], row["rotation"], row["seqlen"]): row for row in prediction.get("rows", [])
    }
    measured = [
        (name, report)
        for name, document in documents.items()
        for report in document.get("reports", [])
    ]
    if not known and not measured:
        return
    page.table(
        "What the rotation costs: predicted / measured (measured over predicted)",
        f"Medians, slowest rank. Predicted before, from {prediction.get('source', 'none')}.\n"
        "T: the attention over S. Overhead: W T / T1 - 1. Exposed: T less the same code sending\n"
        "nothing. Both: forward and backward in one go. Starred: T1 of fewer tokens, by pairs.",
        (
            *("call", "W", "N", "S", "rotation", "direction", "T ms", "exposed ms", "T1/W ms"),
            *("overhead %", "overlap %", "contention ms", "GB/s", "layer ms", "layer overhead %"),
        ),
    )
    for name, report in measured:
        setting = report["setting"]
        guess = known.pop((name, setting["rotation"], setting["seqlen"]), {})
        layers = {row["phase"]: row for row in report["layer"]}
        for phase in (row for row in report["phases"] if row["phase"] in SHOWN_PHASES):
            model, layer = guess.get(phase["phase"], {}), layers.get(phase["phase"], {})
            single = phase["single"] and 1e3 * phase["single"]["median"] / setting["world_size"]
            page.row(
                *place(name, setting, setting["rotation"]),
                phase["phase"],
                pair(model.get("T"), 1e3 * phase["real"]["median"]),
                pair(model.get("exposed"), 1e3 * phase["exposed"]),
                number(single) + ("*" if report["extrapolated"] else ""),
                number(phase["overhead"], ".1f", 100),
                number(phase["overlap"], ".0f", 100),
                number(phase["contention"], ".3f", 1e3),
                number(phase["gigabytes_per_second"], ".0f"),
                number(layer.get("real", {}).get("median"), ".3f", 1e3),
                number(layer.get("overhead"), ".1f", 100),
            )
    for (name, rotation, _), row in known.items():
        for direction in SHOWN_PHASES:
            model = (f"{row[direction][key]:.3f} / -" for key in ("T", "exposed"))
            page.row(*place(name, row, rotation), direction, *model, *["-"] * 7)


def place(name: str, sizes: Document, rotation: str) -> tuple[str, ...]:
    lengths = (f"{sizes['seqlen']:,}", f"{sizes['subsequence']:,}")
    return (name, str(sizes["world_size"]), *lengths, rotation)


def peers(page: Page, documents: Mapping[str, Document]) -> None:
    """Show our rings beside ring-flash-attn's, on the same tensors."""
    header = ("S", "rotation", "backend", "forward ms", "f+b ms", "over theirs, f", "f+b")
    for name, document in documents.items():
        if not name.startswith("peer_"):
            continue
        page.table(f"Beside ring-flash-attn's zigzag ring, {name}", "", header)
        for row in document["rows"]:
            page.row(
                *(f"{row['seqlen']:,}", row["rotation"], row["backend"]),
                *(number(row["ms"][phase]) for phase in SHOWN_PHASES),
                *(number(row.get("over_peer", {}).get(phase)) for phase in SHOWN_PHASES),
            )
        if document["peer_missing"]:
            page.line(f"\nNot timed: {document['peer_missing']}.")


def training(page: Page, documents: Mapping[str, Document]) -> None:
    """Show steps of the decoder, a row a mode."""
    found = [document for name, document in documents.items() if name.startswith("train_")]
    if found:
        page.table(
            "Training steps, FSDP2 x context parallelism, recomputing, batch 1",
            "",
            (
                *("recipe", "step", "N", "cp", "seconds", "tokens/s a rank", "TFLOP/s a rank"),
                *("peak GiB", "rotation's waits %"),
            ),
        )
    for document in found:
        for row in document["rows"]:
            page.row(
                document["card"]["recipe"],
                f"{row['mode']}{', compiled' if row['compiled'] else ''}",
                f"{row['seqlen']:,}",
                document["card"]["cp"],
                f"{row['seconds']:.3f} ({row['least']:.3f}-{row['most']:.3f})",
                f"{row['tokens_per_second_per_rank']:,.0f}",
                f"{row['model_tflop_s_per_rank']:.1f}",
                f"{row['peak_gib']:.1f}",
                number(row["rotation_share"], ".2f", 100),
            )


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the steps' documents")
    parser.add_argument("--out", type=Path, required=True, help="folder of the page")
    parser.add_argument("--commit", default="")
    parser.add_argument("--command", default="")
    parser.add_argument("--date", default=today())
    args = parser.parse_args(arguments)
    steps, documents = read(args.work)
    cards = {name: doc["card"] for name, doc in documents.items() if "card" in doc}
    facts: Document = {"date": args.date, "command": args.command}
    facts |= max(cards.values(), key=lambda card: card["world_size"], default={})
    facts["commit"] = args.commit or facts.get("commit", "")
    bad = [f"{name}: {state}" for name, state, _ in steps if state != "ok"]
    wrong = [text for document in documents.values() for text in document.get("wrong", [])]
    page = Page("Several GPUs of one host", facts, shown=False)
    page.table("Steps", "", ("step", "state", "seconds"), steps)
    for text in wrong:
        page.line(f"\n**Wrong:** {text}")
    for section in (correctness, overhead, peers, training):
        section(page, documents)
    args.out.mkdir(parents=True, exist_ok=True)
    write_page(args.out / "multi_gpu.md", page.markdown)
    for document in documents.values():
        for report in document.get("reports", []):
            report.pop("timeline", None)
    write({"card": facts, "steps": steps, "documents": documents}, args.out / "multi_gpu.json")
    last_line({"not ok": bad, "wrong": wrong, "out": str(args.out)})


if __name__ == "__main__":
    escape_unprintable()
    main()
