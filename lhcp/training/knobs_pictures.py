"""The pictures of what knobs do: a chart with a line a knob, and losses against steps."""

from pathlib import Path
from statistics import fmean
from typing import Any

from lhcp.training.knobs import BASE
from lhcp.training.knobs_results import Row, label
from lhcp.training.recovery_report import band, curve, since, switch_step


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


def draw_curves(rows: dict[str, Row], path: Path) -> None:
    """Write a PNG of held-out losses against steps, each stage's in its own mode, mean over seeds.

    The base is thick.
    """
    # Here, because a machine that trains may have none. Figure needs no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots()
    for index, row in enumerate(rows.values()):
        results = list(row.results.values())
        switch = switch_step(results[0])
        first = band([curve(r, "lighthouse") for r in results])
        # At the switch itself the dense mode has the jump.
        second = since(band([curve(r, "dense") for r in results]), switch)
        style: dict[str, Any] = {
            "color": f"C{index % 10}",
            "linewidth": 2.5 if row is rows[BASE] else 1,
        }
        line = "-" if index < 10 else "--"
        axes.plot(first.steps, first.mean, line, label=label(row, rows[BASE]), **style)
        axes.plot(second.steps, second.mean, line, **style)
        axes.axvline(switch, color="gray", linestyle=":", linewidth=1)
    axes.set_yscale("log")
    for axis_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_formatter("{x:g}")
    axes.set_xlabel("step; dotted: the switch")
    axes.set_ylabel("held-out loss, nats per byte, in the mode that is trained")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=110)
