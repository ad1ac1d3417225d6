"""The pictures of a recovery: loss against steps and against seconds, with bands over seeds."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Literal

from lhcp.layer.module import Mode
from lhcp.training.recovery_report import (
    Curve,
    band,
    bands,
    by_arm,
    since,
    switch_step,
    training_seconds,
)
from lhcp.training.recovery_results import ArmResult

POINTS = 60
"""Means that a training loss is drawn as; a line a step would hide all others."""

Against = Literal["steps", "seconds"]

STYLES: dict[Mode, str] = {"dense": "o-", "lighthouse": "s--"}


def training_curve(result: ArmResult) -> Curve:
    """Return the training loss as means over equal numbers of steps, each at its last step."""
    losses, clock = result.columns["loss"], training_seconds(result)
    size = max(len(losses) // POINTS, 1)
    ends = range(size, len(losses) + 1, size)
    return Curve(
        tuple(float(end) for end in ends),
        tuple(clock[end - 1] for end in ends),
        tuple(fmean(losses[end - size : end]) for end in ends),
    )


def draw(results: Sequence[ArmResult], path: Path, against: Against) -> None:
    """Write the losses as a PNG.

    Held-out losses have markers and bands from the lowest to the highest seed; training losses are
    thin. A split is drawn from its switch on: what comes before is the lighthouse stage's.
    """
    # Here, because a machine that trains may have none. Figure needs no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    arms = by_arm(results)
    for index, (arm, modes) in enumerate(bands(results).items()):
        color, same = f"C{index}", arms[arm]
        switch = switch_step(same[0])
        training = since(band([training_curve(r) for r in same]), switch)
        axes.plot(getattr(training, against), training.mean, color=color, linewidth=0.5, alpha=0.6)
        for mode, held in modes.items():
            x, label = getattr(held, against), f"{arm}, {mode} mode"
            axes.plot(x, held.mean, STYLES[mode], color=color, markersize=3, label=label)
            axes.fill_between(x, held.low, held.high, color=color, alpha=0.2, linewidth=0)
        if switch:
            clock = fmean(training_seconds(result)[switch - 1] for result in same)
            at = switch if against == "steps" else clock
            axes.axvline(at, color=color, linestyle=":", linewidth=1)
    axes.set_yscale("log")
    for axis_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_formatter("{x:g}")
    axes.set_xlabel("step" if against == "steps" else "training seconds, mean over seeds")
    axes.set_ylabel("loss, nats per byte")
    seeds = ", ".join(map(str, sorted({result.seed for result in results})))
    axes.set_title(
        f"{results[0].recipe}, seeds {seeds}: held-out loss, mean and lowest to highest\n"
        "thin: training loss; dotted: the switch"
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)
