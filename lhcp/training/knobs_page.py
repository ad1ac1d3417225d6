"""The page of what knobs do: a table, a chart of it, heat maps, and its numbers as JSON."""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from lhcp.config import LighthouseConfig
from lhcp.training import recovery_results, retrieval_report
from lhcp.training.history import History
from lhcp.training.identity import ADDED, Identity
from lhcp.training.knobs import BASE, read_answers
from lhcp.training.recovery import LIGHTHOUSE
from lhcp.training.recovery_page import cards, facts, number, table
from lhcp.training.recovery_report import curve, training_seconds
from lhcp.training.recovery_results import ArmResult
from lhcp.training.report import Switch, find_switch
from lhcp.training.retrieval import Found

LATELY = 0.1
"""Share of a run over whose end its training loss is compared with the same share before it."""


@dataclass(frozen=True)
class Row:
    """One knob: its finished splits and answers, by seed."""

    results: dict[int, ArmResult]
    found: dict[int, Found]

    @property
    def identity(self) -> Identity:
        """What a knob is: what it shares with no other one."""
        (first, *_) = self.results.values()
        return ADDED | {
            k: v for k, v in first.identity.items() if k not in ("seed", "stages", "data.files")
        }

    @property
    def subsequence(self) -> int:
        """S."""
        (first, *_) = self.results.values()
        return LighthouseConfig(**first.run["lighthouse"]).subsequence_length(first.run["seqlen"])

    @property
    def finals(self) -> dict[int, float]:
        """Last held-out loss in dense mode, by seed."""
        return {seed: curve(r, "dense").losses[-1] for seed, r in self.results.items()}

    @property
    def switches(self) -> list[Switch]:
        """What the switch did, of each seed."""
        found = [find_switch(History(evals=r.evals)) for r in self.results.values()]
        return [switch for switch in found if switch is not None]

    def step_seconds(self, stage: int) -> float:
        """Return the median seconds of a step of the first (0) or second stage, over all seeds."""
        return median(
            s
            for r in self.results.values()
            for s in (
                r.columns["seconds"][: r.stages[0][1]]
                if stage == 0
                else r.columns["seconds"][r.stages[0][1] :]
            )
        )

    @property
    def seconds(self) -> float:
        """Training seconds, mean over seeds."""
        return fmean(training_seconds(r)[-1] for r in self.results.values())

    @property
    def falling(self) -> float:
        """By how much training losses fell lately, mean over seeds: large in the steep phase."""
        falls = []
        for r in self.results.values():
            losses = r.columns["loss"]
            size = max(round(LATELY * len(losses)), 1)
            falls.append(fmean(losses[-size:]) - fmean(losses[-2 * size : -size]))
        return fmean(falls)

    @property
    def asked(self) -> float | None:
        """Share of right digits, mean over seeds; None: it was not asked."""
        return fmean(f.mean for f in self.found.values()) if self.found else None


def read(places: Iterable[Path]) -> dict[str, Row]:
    """Return the knobs with a finished split in folders of launch/knobs.py, by name; base first.

    Several folders may have seeds of one knob.

    Raises:
        FileNotFoundError: a place has none, or no place has the base.
        ValueError: results of one knob are of different experiments.
    """
    paths: dict[str, list[Path]] = {}
    for place in places:
        files = sorted(place.glob("*/*_seed*.jsonl"))
        if not files:
            raise FileNotFoundError(f"{place}: no results of knobs.py (base/NAME_seed0.jsonl)")
        for path in files:
            paths.setdefault(path.parent.name, []).append(path)
    rows = {}
    for name, files in sorted(paths.items(), key=lambda item: (item[0] != BASE, item[0])):
        whole = recovery_results.merge(files)
        splits = {r.seed: r for r in whole if r.arm != LIGHTHOUSE}
        found = {s: f for path in files for s, f in read_answers(path.parent).items()}
        if splits:
            rows[name] = Row(splits, {s: f for s, f in found.items() if s in splits})
    if BASE not in rows:
        raise FileNotFoundError(f"{BASE}: no finished split of the run without a change")
    return rows


def label(row: Row, base: Row) -> str:
    """Return what a knob has changed: "topk=256"; of the run without a change "base"."""
    own, other = row.identity, base.identity
    changed = [
        f"{key.split('.')[-1]}={own.get(key)}"
        for key in {**other, **own}
        if own.get(key) != other.get(key)
    ]
    return ", ".join(changed) or BASE


def differences(row: Row, base: Row) -> list[float]:
    """Return final loss less the base's, of the seeds that both have."""
    return [loss - base.finals[seed] for seed, loss in row.finals.items() if seed in base.finals]


def cells(row: Row, base: Row) -> list[str]:
    """Return a knob's row of the table."""
    less = differences(row, base)
    switches = row.switches
    return [
        label(row, base),
        f"{row.subsequence:,}",
        ", ".join(f"{seed}: {loss:.3f}" for seed, loss in sorted(row.finals.items())),
        number(fmean(less), "+") if less and row is not base else "-",
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


def markdown(rows: dict[str, Row], pictures: Sequence[str]) -> str:
    """Return the page."""
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
        "both have; with all layers dense it is dense from scratch. `falling`: the training "
        f"loss of the last {LATELY:.0%} of the steps less that of as many before; far below 0, the "
        "steep phase was not past. Seconds a step are medians, `seconds` sums of training steps. "
        "`passkey`: share of right digits at the end, densely, over all contexts and depths; 0.1 "
        "is chance.",
        "",
        *(f"![knobs]({name})" for name in pictures),
    ]
    lines += table("Knobs", "", HEADER, [cells(row, base) for row in rows.values()])
    contexts = base.found and next(iter(base.found.values())).asked.contexts
    if contexts:
        lines += table(
            "Passkey by context",
            "Share of right digits, mean over depths and seeds.",
            ["changed", *(f"{context:,}" for context in contexts)],
            [
                [label(row, base), *(number(share) for share in by_context(row))]
                for row in rows.values()
                if row.found
            ],
        )
    return "\n".join(lines) + "\n"


def by_context(row: Row) -> list[float]:
    """Return the share of right digits of each context, over depths and seeds."""
    return [
        fmean(share for cells in same for share in cells)
        for same in zip(*(found.accuracy for found in row.found.values()), strict=True)
    ]


def draw(rows: dict[str, Row], path: Path) -> None:
    """Write a PNG with a line a knob: final losses by seed, seconds a step, passkeys."""
    # Here, because a machine that trains may have none. Figure needs no display.
    from matplotlib.figure import Figure

    base = rows[BASE]
    names = [label(row, base) for row in rows.values()]
    figure = Figure(figsize=(13, 1.5 + 0.32 * len(rows)), layout="constrained")
    losses, times, keys = figure.subplots(1, 3, sharey=True, width_ratios=(2, 1, 1))
    for y, row in enumerate(rows.values()):
        finals = list(row.finals.values())
        losses.plot(finals, [y] * len(finals), "o", color="C0", alpha=0.6)
        losses.plot([fmean(finals)], [y], "|", color="C0", markersize=16, markeredgewidth=2)
        times.barh([y - 0.2, y + 0.2], [row.step_seconds(0), row.step_seconds(1)], 0.38,
                   color=["C1", "C7"])  # fmt: skip
        keys.barh(y, row.asked or 0.0, 0.6, color="C2")
    losses.axvline(fmean(base.finals.values()), color="C0", linestyle=":", linewidth=1)
    losses.set_yticks(range(len(names)), names)
    losses.invert_yaxis()
    losses.set_xlabel("held-out loss at the end, dense mode, nats per byte: seeds and mean")
    times.set_xlabel("seconds a step: stage 1, stage 2")
    keys.set_xlabel("passkey, share right")
    keys.set_xlim(0, 1)
    for axes in (losses, times, keys):
        axes.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=120)


def document(rows: dict[str, Row]) -> dict[str, Any]:
    """Return the page's numbers, JSON-ready; steps one by one stay in the results files."""
    base = rows[BASE]
    return {
        "date": time.strftime("%F"),
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


def write(rows: dict[str, Row], folder: Path) -> Path:
    """Write the page, its JSON and its pictures into `folder`; return the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    everything = [result for row in rows.values() for result in row.results.values()]
    stem = f"{everything[0].recipe}_{'_'.join(cards(everything))}_{time.strftime('%F')}"
    pictures = [f"{stem}.png"]
    draw(rows, folder / pictures[0])
    asked = [next(iter(row.found.values())) for row in rows.values() if row.found]
    if asked:
        pictures.append(f"{stem}_passkey.png")
        retrieval_report.draw(asked, folder / pictures[1])
    (folder / f"{stem}.json").write_text(json.dumps(document(rows)) + "\n")
    page = folder / f"{stem}.md"
    page.write_text(markdown(rows, pictures), encoding="utf-8")
    return page
