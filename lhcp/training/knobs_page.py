"""The page of what knobs do: tables, a chart, curves, heat maps, and its numbers as JSON."""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from lhcp.page import write_page
from lhcp.training import retrieval_report
from lhcp.training.knobs import BASE
from lhcp.training.knobs_pictures import draw, draw_curves
from lhcp.training.knobs_results import LATELY, Row, differences, label
from lhcp.training.recovery_page import cards, facts, number, table
from lhcp.training.retrieval import Found
from lhcp.training.short_results import ShortResult, short_section


def cells(row: Row, base: Row) -> list[str]:
    """Return a knob's row of the table."""
    less = differences(row, base)
    switches = row.switches
    return [
        label(row, base),
        f"{row.subsequence:,}",
        ", ".join(f"{seed}: {loss:.3f}" for seed, loss in sorted(row.finals.items())),
        less_base(less) if row is not base else "-",
        number(fmean(s.lighthouse for s in switches)),
        number(fmean(s.dense for s in switches)),
        number(row.falling, "+"),
        f"{row.step_seconds(0):.4f} / {row.step_seconds(1):.4f}",
        f"{row.seconds:.0f}",
        number(row.asked),
    ]


HEADER = [
    *("changed", "S", "final, dense mode, by seed", "less base"),
    *("at the switch, lighthouse mode", "dense mode", "falling"),
    *("s a step, stage 1 / 2", "seconds", "passkey"),
]


def less_base(differences: Sequence[float]) -> str:
    """Return the mean of differences from the base, and all of them where they are several."""
    if not differences:
        return "-"
    each = ", ".join(number(d, "+") for d in differences)
    return number(fmean(differences), "+") + (f" ({each})" if len(differences) > 1 else "")


def markdown(
    rows: dict[str, Row], pictures: Sequence[str], shorts: Sequence[ShortResult] = ()
) -> str:
    """Return the page; with the short stages that its runs began from, if they had one."""
    base = rows[BASE]
    everything = [result for row in rows.values() for result in row.results.values()]
    (stage, steps), (_, tail) = everything[0].stages
    lines = [f"# Knobs: {everything[0].recipe}, {time.strftime('%F')}", ""]
    # The lines of the base; commands and cards of all.
    lines += facts(list(base.results.values()))
    lines.append(f"- cards of all: {', '.join(cards(everything))}")
    lines += [
        "",
        f"Each knob changes the base, trained {steps} steps in {stage} mode and then {tail} "
        "densely. Losses are nats per byte of held-out text. `less base`: mean over the seeds that "
        "both have (and each); with all layers dense it is dense throughout. `falling`: the "
        f"training loss of the last {LATELY:.0%} of the steps less that of as many before; far "
        "below 0, the steep phase was not past. Seconds a step are medians, `seconds` sums of "
        "training steps. "
        "`passkey`: share of right digits at the end, densely, over all contexts and depths; 0.1 "
        "is chance." + noise(base),
        "",
        *(f"![knobs]({name})" for name in pictures),
    ]
    lines += table("Knobs", "", HEADER, [cells(row, base) for row in rows.values()])
    lines += short_section(shorts)
    contexts = base.found and next(iter(base.found.values())).asked.contexts
    if contexts:
        lines += table(
            "Passkey by context",
            "Share of right digits, mean over depths. A seed learns the test or does not.",
            ["changed", "seed", *(f"{context:,}" for context in contexts)],
            [
                [label(row, base), seed, *(number(share) for share in by_context(found))]
                for row in rows.values()
                for seed, found in sorted(row.found.items())
            ],
        )
    return "\n".join(lines) + "\n"


def noise(base: Row) -> str:
    """Say how far seeds of the base lie apart, where there are several."""
    finals = base.finals.values()
    if len(finals) < 2:
        return " **The base has one seed: what a difference is worth is not known.**"
    apart = max(finals) - min(finals)
    (first, *_) = base.results.values()
    if first.run.get("short", {}).get("steps"):
        return (
            f" Seeds of the base lie {apart:.3f} apart, by their short stages and texts, which the "
            "knobs of a seed share: **what a difference is worth, its seeds' agreement tells.**"
        )
    return f" **Seeds of the base lie {apart:.3f} apart: smaller differences say nothing.**"


def by_context(found: Found) -> list[float]:
    """Return the share of right digits of each context, over depths."""
    return [fmean(cells) for cells in found.accuracy]


def models(rows: dict[str, Row], seed: int) -> list[Found]:
    """Return what the models of a seed answered, each named after what its knob has changed."""
    return [
        replace(row.found[seed], name=f"{label(row, rows[BASE])}, seed {seed}")
        for row in rows.values()
        if seed in row.found
    ]


def document(rows: dict[str, Row], shorts: Sequence[ShortResult] = ()) -> dict[str, Any]:
    """Return the page's numbers, JSON-ready; steps one by one stay in the results files."""
    base = rows[BASE]
    return {
        "date": time.strftime("%F"),
        "short": [short.to_json() for short in shorts],
        "knobs": [
            {
                "name": name,
                "changed": label(row, base),
                "subsequence": row.subsequence,
                "finals": row.finals,
                "less_base": differences(row, base),
                "falling": row.falling,
                "seconds": row.seconds,
                "step_seconds": [row.step_seconds(0), row.step_seconds(1)],
                "passkey": {seed: found.to_json() for seed, found in row.found.items()},
                "evals": {s: [vars(e) for e in r.evals] for s, r in row.results.items()},
                "about": {seed: r.about for seed, r in row.results.items()},
                "identity": row.identity,
            }
            for name, row in rows.items()
        ],
    }


def write(rows: dict[str, Row], folder: Path, shorts: Sequence[ShortResult] = ()) -> Path:
    """Write the page, its JSON and its pictures into `folder`; return the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    everything = [result for row in rows.values() for result in row.results.values()]
    stem = f"{everything[0].recipe}_{'_'.join(cards(everything))}_{time.strftime('%F')}"
    pictures = [f"{stem}.png", f"{stem}_steps.png"]
    draw(rows, folder / pictures[0])
    draw_curves(rows, folder / pictures[1])
    for seed in sorted({seed for row in rows.values() for seed in row.found}):
        pictures.append(f"{stem}_passkey_seed{seed}.png")
        retrieval_report.draw(models(rows, seed), folder / pictures[-1])
    (folder / f"{stem}.json").write_text(json.dumps(document(rows, shorts)) + "\n")
    page = folder / f"{stem}.md"
    write_page(page, markdown(rows, pictures, shorts))
    return page
