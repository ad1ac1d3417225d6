"""The picture of how the selection of each layer moves in training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

PANELS = {
    "spread_q": "spread of query scores (std / mean)",
    "spread_k": "spread of key scores (std / mean)",
    "near_ties": "share of near-ties",
    "overlap": "overlap of kv heads",
}
"""Fields of a `SelectionRecord` and what they are called."""


def draw_selections(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG with a panel a number and a line a layer, the first layer darkest.

    Args:
        records: `asdict` of the `SelectionRecord`s of a history.
        path: The PNG.
    """
    # Here, because a machine that trains may have none. Figure needs no display.
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    layers = sorted({record["layer"] for record in records})
    colors = colormaps["viridis"].resampled(max(len(layers), 2))
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = list(figure.subplots(2, 2, sharex=True).flat)
    for axes, (name, title) in zip(panels, PANELS.items(), strict=True):
        for index, layer in enumerate(layers):
            points = [
                (record["step"], record[name])
                for record in records
                if record["layer"] == layer and record[name] is not None
            ]
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, "o-", color=colors(index), markersize=3, label=f"layer {layer}")
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=120)
