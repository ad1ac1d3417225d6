"""What a run tells its user: progress; at the end a table, a picture and a JSON file."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lhcp.training.efficiency import flops_per_token
from lhcp.training.history import EvalRecord, History, StepRecord
from lhcp.training.run import Run
from lhcp.training.selection_picture import draw_selections
from lhcp.training.stages import Stage, total_steps

STEPS_A_LINE = 10
"""Steps to each printed line where the output is not a terminal."""


class Progress:
    """Prints the progress of a run on rank 0.

    On a terminal each step has its line, in place. Elsewhere one step in ten has, and each stage's
    first step, and the run's last; evaluations always have theirs.

    Args:
        shown: Whether this rank prints.
    """

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self.in_place = shown and sys.stdout.isatty()
        self._recent: list[float] = []
        self._stage = ""

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self.shown:
            print(("\r\x1b[K" if self.in_place else "") + text, flush=True)

    def on_start(self, done: int, folder: Path) -> None:
        """Tell of a run that goes on."""
        self._recent, self._stage = [], ""
        if done:
            self.say(f"{folder}: found a checkpoint, going on after step {done}")

    def on_passed_over(self, said: str) -> None:
        """Print which checkpoint is not taken, and why."""
        self.say(said)

    def on_step(self, record: StepRecord, stages: Sequence[Stage]) -> None:
        """Print the step's line, if it is one that has a line."""
        # The time from line to line counts evaluations and checkpoints too.
        now = time.perf_counter()
        self._recent = [*self._recent[-50:], now]
        pace = record.seconds
        if len(self._recent) > 1:
            pace = (now - self._recent[0]) / (len(self._recent) - 1)
        new_stage, self._stage = record.stage != self._stage, record.stage
        last = record.step == total_steps(stages)
        if not (self.in_place or new_stage or last or record.step % STEPS_A_LINE == 0):
            return
        left = round((total_steps(stages) - record.step) * pace)
        packed = "" if record.documents is None else f"documents {record.documents:>3}  "
        line = (
            f"{record.stage:<10} {record.step:>5}/{total_steps(stages)}  loss {record.loss:6.4f}  "
            f"{'NOT FINITE, SKIPPED  ' if record.skipped else ''}"
            f"grad {record.grad_norm:6.3f}  {record.tokens_per_second:>7,.0f} tok/s  "
            f"{packed}rotation {share_of(record.rotation_share)}{use_of(record)}  "
            f"ETA {left // 60}:{left % 60:02d}"
        )
        if self.in_place:
            print("\r\x1b[K" + line, end="", flush=True)
        else:
            self.say(line)

    def on_eval(self, record: EvalRecord) -> None:
        """Print the evaluation's line."""
        self.say(
            f"{record.stage:<10} {record.step:>5}  held-out loss {record.loss:.4f} nats/byte, "
            f"attending in {record.mode} mode"
        )


@dataclass(frozen=True)
class StageSpeed:
    """The speed of one stage: medians over its steps, the first few left out."""

    tokens_per_second: float
    rotation_share: float | None
    """None: not timed."""


def share_of(share: float | None) -> str:
    """Return a share of a step in five places."""
    return "    -" if share is None else f"{share:5.1%}"


def use_of(record: StepRecord) -> str:
    """Return what a step used of its GPU, as far as that is known."""
    memory = "" if record.peak_gib is None else f"  mem {record.peak_gib:.1f} GiB"
    return memory + ("" if record.mfu is None else f"  MFU {record.mfu:.0%}")


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


@dataclass(frozen=True, kw_only=True)
class Switch:
    """What the change from lighthouse to dense did to the held-out loss, nats per byte."""

    step: int
    lighthouse: float
    """At the switch, attending as trained."""
    dense: float
    """At the switch, the same weights and text attending densely."""
    final: float
    """At the end of the dense stage, dense."""
    recovered_at: int | None
    """Dense steps until the dense loss was back at `lighthouse`, as far as evaluations tell."""

    @property
    def jump(self) -> float:
        """Return how much the loss rises at the switch."""
        return self.dense - self.lighthouse

    @property
    def recovered(self) -> float | None:
        """Return the share of the jump won back (above 1: more), or None without a jump."""
        return (self.dense - self.final) / self.jump if self.jump > 0.01 else None


def find_switch(history: History) -> Switch | None:
    """Return the switch of a two-stage history, or None where a stage has not been evaluated."""
    last: dict[tuple[str, str], EvalRecord] = {(r.stage, r.mode): r for r in history.evals}
    keys = ("lighthouse", "lighthouse"), ("lighthouse", "dense"), ("dense", "dense")
    if any(key not in last for key in keys):
        return None
    sparse, jumped, final = (last[key] for key in keys)
    back = (
        r.step - sparse.step for r in history.evals if r.stage == "dense" and r.loss <= sparse.loss
    )
    return Switch(
        step=sparse.step,
        lighthouse=sparse.loss,
        dense=jumped.loss,
        final=final.loss,
        recovered_at=next(back, None),
    )


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
