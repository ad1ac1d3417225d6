"""What the passkey test shows its user: a table, a heat map a model, and a JSON file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lhcp.training.retrieval import Found

CHANCE = 0.1
"""Of one digit in ten."""
IN_A_LINE = 4
"""Heat maps beside each other."""


def title(found: Found) -> str:
    """Return what a model is called: where it was, how it was trained and how it attends here."""
    trained = " + ".join(f"{steps:,} {mode}" for mode, steps in found.stages)
    return f"{found.name}: {trained} steps, asked in {found.asked.mode} mode"


def table(found: Found) -> str:
    """Return the share of right digits as text: a row a context, a column a depth."""
    asked = found.asked
    rows = [["context", *(f"{depth:.0%}" for depth in asked.depths), "mean"]]
    for context, cells in zip(asked.contexts, found.accuracy, strict=True):
        average = sum(cells) / len(cells)
        rows.append([f"{context:,}", *(f"{cell:.2f}" for cell in cells), f"{average:.3f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(x.rjust(w) for x, w in zip(row, widths, strict=True)) for row in rows]
    questions = len(asked.contexts) * len(asked.depths) * asked.trials
    last = f"mean {found.mean:.3f} of {questions} questions; chance {CHANCE:g}"
    return "\n".join([title(found), *lines, last])


def draw(found: Sequence[Found], path: Path) -> None:
    """Write a PNG with a heat map for each model: depth against context, green where it is right.

    All maps have one scale from 0 to 1, and are four in a line at most.
    """
    # Here, because a machine that trains may have none. Figure needs no display.
    from matplotlib.figure import Figure

    columns = min(len(found), IN_A_LINE)
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(1.5 + 5.5 * columns, 5.5 * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in panels[len(found) :]:
        axes.set_axis_off()
    for axes, one in zip(panels, found, strict=False):
        asked = one.asked
        # A row a depth, a column a context.
        cells = [list(column) for column in zip(*one.accuracy, strict=True)]
        image = axes.imshow(cells, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(asked.contexts)), [f"{c:,}" for c in asked.contexts])
        axes.set_yticks(range(len(asked.depths)), [f"{d:.0%}" for d in asked.depths])
        axes.set_xlabel("context, bytes")
        axes.set_ylabel("depth of the key")
        for y, row in enumerate(cells):
            for x, cell in enumerate(row):
                axes.text(x, y, f"{cell:.1f}", ha="center", va="center", fontsize=8)
        axes.set_title(
            title(one).replace(": ", "\n", 1) + f"\nmean {one.mean:.3f}, chance {CHANCE:g}",
            fontsize=9,
        )
    figure.colorbar(image, ax=panels, label="share of right digits")
    figure.savefig(path, dpi=120)


def write(found: Sequence[Found], folder: Path, about: dict[str, Any]) -> Path:
    """Print the tables, write retrieval.json and retrieval.png into `folder`; return the picture.

    Args:
        found: What at least one model answered.
        folder: Made where it is not there.
        about: Where and how it was made, into the JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers, picture = folder / "retrieval.json", folder / "retrieval.png"
    record = {"about": about, "chance": CHANCE, "found": [one.to_json() for one in found]}
    numbers.write_text(json.dumps(record, indent=1))
    draw(found, picture)
    print("\n\n".join(table(one) for one in found))
    print(f"all numbers: {numbers}\npicture: {picture}", flush=True)
    return picture
