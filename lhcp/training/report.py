"""What a finished run tells its user: a table, a picture and a JSON file."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lhcp.training.efficiency import flops_per_token
from lhcp.training.history import History, StepRecord
from lhcp.training.run import Run
from lhcp.training.selection_picture import draw_selections
from lhcp.training.switch import find_switch


@dataclass(frozen=True)
class StageSpeed:
    """The speed of one stage: medians over its steps, the first few left out."""

    tokens_per_second: float
    rotation_share: float | None
    """None: not timed."""


def speeds(history: History) -> dict[str, StageSpeed]:
    """Return each stage's speed."""
    by_stage: dict[str, list[StepRecord]] = {}
    for record in history.steps:
        by_stage.setdefault(record.stage, []).append(record)
    found = {}
    for stage, records in by_stage.items():
        settled = records[3:] or records
        shares = [r.rotation_share for r in settled if r.rotation_share is not None]
        found[stage] = StageSpeed(
            median(r.tokens_per_second for r in settled), median(shares) if shares else None
        )
    return found


def summarize(
    run: Run,
    history: History,
    baseline: History | None,
    *,
    world_size: int,
    sample: str = "",
    overhead: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return everything about a finished run as one JSON-ready dict.

    Args:
        run: The run.
        history: Records of the two stages.
        baseline: Records of dense from scratch, or None.
        world_size: Ranks of the run.
        sample: Generated text.
        overhead: What was measured of the rotation beside the run, or None.
    """
    switch = find_switch(history)
    derived = {} if switch is None else {"jump": switch.jump, "recovered": switch.recovered}
    measured = speeds(history) | (speeds(baseline) if baseline else {})
    return {
        "switch": None if switch is None else asdict(switch) | derived,
        "baseline_final": baseline.evals[-1].loss if baseline and baseline.evals else None,
        "stages": {name: asdict(speed) for name, speed in measured.items()},
        "flops_per_token": {
            "lighthouse": flops_per_token(run.model, run.seqlen, run.lighthouse),
            "dense": flops_per_token(run.model, run.seqlen),
        },
        "overhead": overhead,
        "sample": sample,
        "world_size": world_size,
        "run": asdict(run),
        "history": asdict(history),
        "baseline_history": asdict(baseline) if baseline else None,
    }


def table(summary: dict[str, Any]) -> Table:
    """Return the closing table of `summarize`'s dict."""
    rows = Table(title=f"{summary['run']['name']}: lighthouse, then dense", title_justify="left")
    rows.add_column("measured")
    rows.add_column("value", justify="right")
    rows.add_column("unit")
    nats = "nats/byte, held-out"
    switch, baseline = summary["switch"], summary["baseline_final"]
    if switch is not None:
        rows.add_row("at the switch, lighthouse mode", f"{switch['lighthouse']:.4f}", nats)
        rows.add_row("at the switch, dense mode", f"{switch['dense']:.4f}", nats)
        rows.add_row("jump at the switch", f"{switch['jump']:+.4f}", nats)
        rows.add_row("final, dense mode", f"{switch['final']:.4f}", nats)
        share = switch["recovered"]
        shown = "no jump" if share is None else f"{share:.0%}"
        rows.add_row("share of the jump recovered", shown, "of the jump")
        back = switch["recovered_at"]
        rows.add_row(
            "back at the loss before the switch",
            "not reached" if back is None else f"{back}",
            "dense steps, at most",
        )
        if baseline is not None:
            rows.add_row("baseline, dense from scratch", f"{baseline:.4f}", nats)
            rows.add_row("final against the baseline", f"{switch['final'] - baseline:+.4f}", nats)
    rows.add_section()
    for stage, speed in summary["stages"].items():
        rows.add_row(f"{stage}: speed", f"{speed['tokens_per_second']:,.0f}", "tokens/s, all ranks")
        share = speed["rotation_share"]
        shown = "not timed" if share is None else f"{share:.1%}"
        rows.add_row(f"{stage}: waiting in rotation", shown, "of a step")
    skipped = sum(step["skipped"] for step in summary["history"]["steps"])
    if skipped:
        rows.add_row("steps not taken", f"{skipped:,}", "not finite, or spikes")
    for change in summary["history"]["changes"]:
        rows.add_row(
            f"accepted after step {change['step']}: {change['name']}",
            escape(str(change["now"])),
            escape(f"before: {change['before']}"),
        )
    for name, value in (summary["overhead"] or {}).items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        rows.add_row(f"rotation: {name}", shown, "")
    return rows


def draw(summary: dict[str, Any], path: Path) -> None:
    """Write the curves as a PNG: training loss thin, held-out loss dotted, the switch a line."""
    # Here, because the import takes a second and only rank 0 draws. Figure needs no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    runs = {"two stages": summary["history"], "baseline": summary["baseline_history"]}
    for color, (name, history) in zip(("C0", "C1"), runs.items(), strict=True):
        if history is None:
            continue
        steps = history["steps"]
        axes.plot(
            [r["step"] for r in steps],
            [r["loss"] for r in steps],
            color=color,
            linewidth=0.6,
            alpha=0.6,
            label=f"{name}, training",
        )
        for mode, style in (("dense", "o-"), ("lighthouse", "s--")):
            held = [(r["step"], r["loss"]) for r in history["evals"] if r["mode"] == mode]
            if held:
                label = f"{name}, held-out, {mode} mode"
                axes.plot(*zip(*held, strict=True), style, color=color, markersize=4, label=label)
    if summary["switch"] is not None:
        axes.axvline(summary["switch"]["step"], color="grey", linestyle=":", label="switch")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def write(summary: dict[str, Any], folder: Path) -> None:
    """Print the sample and the table, and write report.json and curves.png into `folder`.

    Of a run that diagnosed its layers selection.png too. The last line names the curves.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers, picture = folder / "report.json", folder / "curves.png"
    numbers.write_text(json.dumps(summary, indent=1))
    draw(summary, picture)
    selections = summary["history"]["selections"]
    if selections:
        draw_selections(selections, folder / "selection.png")
    # Without a terminal rich would wrap the table at 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 100)
    if summary["sample"]:
        console.rule("written by the dense model")
        console.print(summary["sample"], markup=False, highlight=False)
    console.print(table(summary))
    # Not by rich, which would wrap a long path.
    if selections:
        print(f"selection by layer: {folder / 'selection.png'}")
    print(f"all numbers: {numbers}\npicture: {picture}", flush=True)
