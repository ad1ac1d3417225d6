"""One page and one JSON file from what the steps of bench/multi_gpu.sh left behind.

    python bench/multi_gpu_page.py --work FOLDER --out FOLDER

Reads steps.tsv (name, state, seconds) and a JSON document a step; writes multi_gpu.md and
multi_gpu.json. Steps that did not run, or left no document, are named and no more. Made again
after every step, so that a call that is cut off leaves what it had. The last line is JSON.
"""

import argparse
import datetime
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

TENSORS = ("out", "dq", "dk", "dv")
PHASES = ("forward", "both")
Document = dict[str, Any]


def read(work: Path) -> tuple[list[list[str]], dict[str, Document]]:
    """Steps in the order in which they ran, and their documents by name."""
    steps = [line.split("\t") for line in (work / "steps.tsv").read_text().splitlines()]
    documents = {}
    for name, *_ in steps:
        path = work / f"{name}.json"
        if path.exists():
            documents[name] = json.loads(path.read_text())
    return steps, documents


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Markdown lines."""
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return lines + [f"| {' | '.join(map(str, row))} |" for row in rows]


def number(value: float | None, form: str = ".3f", factor: float = 1.0) -> str:
    return "-" if value is None else f"{factor * value:{form}}"


def correctness(documents: dict[str, Document]) -> list[str]:
    """What was compared and how far apart it is, a row a way to attend."""
    lines: list[str] = []
    found = [documents[name] for name in ("check_small", "check_long") if name in documents]
    rows = [row for document in found for row in document["rows"]]
    # Both documents hold rank 0 against float64.
    checked = list({title(row): row for row in rows if row["check"] != "peer"}.values())
    if checked:
        lines += ["", "## Correctness: relative l2 distances, forward and backward", ""]
        lines += [
            '"float64" and "compiled": to the reference in float64, judged by the error budget.',
            '"one rank": to rank 0 alone; at most three times its own error and a rounding.',
            "Selections are equal bit for bit, or the row is wrong.",
            "",
        ]
        cells = [
            (
                row["check"],
                f"{row['kind']} {row['seqlen']:,}",
                named(row),
                row["backend"],
                *(number(row.get("error", {}).get(name), ".2e") for name in TENSORS),
                row["wrong"] or "right",
            )
            for row in checked
        ]
        lines += table(("against", "what", "rotation", "backend", *TENSORS, ""), cells)
    peers = [row for row in rows if row["check"] == "peer"]
    if peers:
        lines += ["", "## Our error against float64 over ring-flash-attn's", ""]
        lines += table(
            ("what", "rotation", "backend", *TENSORS, ""),
            [
                (
                    f"{row['kind']} {row['seqlen']:,}",
                    named(row),
                    row["backend"],
                    *(number(row["ratio"][name]) for name in TENSORS),
                    row["wrong"] or "right",
                )
                for row in peers
            ],
        )
    if missing := documents.get("check_small", {}).get("peer_missing"):
        lines += ["", f"Not compared: {missing}."]
    return lines


def title(row: Document) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("check", "kind", "seqlen", "rotation", "backend"))


def named(row: Document) -> str:
    took = row["took"] != row["rotation"]
    return f"{row['rotation']} ({row['took']})" if took else str(row["rotation"])


def pair(predicted: float | None, measured: float | None) -> str:
    """Predicted / measured milliseconds, and measured over predicted."""
    if predicted is None or measured is None:
        return f"- / {number(measured)}"
    ratio = f" ({measured / predicted:.2f})" if predicted > 0 else ""
    return f"{predicted:.3f} / {measured:.3f}{ratio}"


def overhead(documents: dict[str, Document]) -> list[str]:
    """The rotation's cost beside the model's word, a row a rotation, length and direction."""
    known = {
        (row["row"], row["rotation"], row["seqlen"]): row
        for row in documents.get("predict", {}).get("rows", [])
    }
    cells = []
    for name, document in documents.items():
        for report in document.get("reports", []):
            setting = report["setting"]
            guess = known.pop((name, setting["rotation"], setting["seqlen"]), {})
            layers = {row["phase"]: row for row in report["layer"]}
            for phase in (row for row in report["phases"] if row["phase"] in PHASES):
                model = guess.get(phase["phase"], {})
                layer = layers.get(phase["phase"], {})
                single = phase["single"] and 1e3 * phase["single"]["median"]
                cells.append(
                    (
                        *place(name, setting, setting["rotation"]),
                        phase["phase"],
                        pair(model.get("T"), 1e3 * phase["real"]["median"]),
                        pair(model.get("exposed"), 1e3 * phase["exposed"]),
                        number(single and single / setting["world_size"])
                        + ("*" if report["extrapolated"] else ""),
                        number(phase["overhead"], ".1f", 100),
                        number(phase["overlap"], ".0f", 100),
                        number(phase["contention"], ".3f", 1e3),
                        number(phase["gigabytes_per_second"], ".0f"),
                        number(layer.get("real", {}).get("median"), ".3f", 1e3),
                        number(layer.get("overhead"), ".1f", 100),
                    )
                )
    for (name, rotation, _), row in known.items():
        for phase in PHASES:
            model = (f"{row[phase][key]:.3f} / -" for key in ("T", "exposed"))
            empty = ["-"] * 7
            cells.append((*place(name, row, rotation), phase, *model, *empty))
    if not cells:
        return []
    source = documents.get("predict", {}).get("source", "none")
    header = ("call", "W", "N", "S", "rotation", "direction", "T ms", "exposed ms", "T1/W ms")
    header += ("overhead %", "overlap %", "contention ms", "GB/s", "layer ms", "layer overhead %")
    return [
        *("", "## What the rotation costs: predicted / measured (measured over predicted)", ""),
        f"Medians, slowest rank. Predicted before the run, from {source}.",
        "T: the attention over S. Overhead: W T / T1 - 1. Exposed: T less the same code sending",
        "nothing. Both: forward and backward in one go. Starred: T1 of fewer tokens, by pairs.",
        "",
        *table(header, cells),
    ]


def place(name: str, sizes: Document, rotation: str) -> tuple[str, ...]:
    lengths = (f"{sizes['seqlen']:,}", f"{sizes['subsequence']:,}")
    return (name, str(sizes["world_size"]), *lengths, rotation)


def peers(documents: dict[str, Document]) -> list[str]:
    """Our rings beside ring-flash-attn's, on the same tensors."""
    lines: list[str] = []
    for name, document in documents.items():
        if not name.startswith("peer_"):
            continue
        lines += ["", f"## Beside ring-flash-attn's zigzag ring, {name}", ""]
        rows = [
            (
                f"{row['seqlen']:,}",
                row["rotation"],
                row["backend"],
                *(number(row["ms"][phase]) for phase in PHASES),
                *(number(row.get("over_peer", {}).get(phase)) for phase in PHASES),
            )
            for row in document["rows"]
        ]
        header = ("S", "rotation", "backend", "forward ms", "f+b ms", "over theirs, f", "f+b")
        lines += table(header, rows)
        if document["peer_missing"]:
            lines += ["", f"Not timed: {document['peer_missing']}."]
    return lines


def training(documents: dict[str, Document]) -> list[str]:
    """Steps of the decoder, a row a mode."""
    rows = [
        (
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
        for name, document in documents.items()
        if name.startswith("train_")
        for row in document["rows"]
    ]
    header = ("recipe", "step", "N", "cp", "seconds", "tokens/s a rank", "TFLOP/s a rank")
    header += ("peak GiB", "rotation's waits %")
    if not rows:
        return []
    title = "## Training steps, FSDP2 x context parallelism, recomputing, batch 1"
    return ["", title, "", *table(header, rows)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of the steps' documents")
    parser.add_argument("--out", type=Path, required=True, help="folder of the page")
    parser.add_argument("--commit", default="")
    parser.add_argument("--command", default="")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    args = parser.parse_args(arguments)
    steps, documents = read(args.work)
    cards = {name: doc["card"] for name, doc in documents.items() if "card" in doc}
    facts: Document = {"date": args.date, "command": args.command}
    facts |= max(cards.values(), key=lambda card: card["world_size"], default={})
    facts["commit"] = args.commit or facts.get("commit", "")
    bad = [f"{name}: {state}" for name, state, _ in steps if state != "ok"]
    wrong = [text for document in documents.values() for text in document.get("wrong", [])]
    lines = ["# Several GPUs of one host", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", *table(("step", "state", "seconds"), steps)]
    lines += [f"\n**Wrong:** {text}" for text in wrong]
    for section in (correctness, overhead, peers, training):
        lines += section(documents)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "multi_gpu.md").write_text("\n".join(lines) + "\n")
    for document in documents.values():
        for report in document.get("reports", []):
            report.pop("timeline", None)
    whole = {"card": facts, "steps": steps, "documents": documents}
    (args.out / "multi_gpu.json").write_text(json.dumps(whole) + "\n")
    print(json.dumps({"not ok": bad, "wrong": wrong, "out": str(args.out)}))


if __name__ == "__main__":
    main()
