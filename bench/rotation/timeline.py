"""The picture of one measurement: what every rank computes, and what it waits for."""

from bench.common.figures import pyplot, save
from lhcp.measure import Mark, OverheadReport

_COLOURS = {"compute": "#4477aa", "wait": "#cc3311", "message": "#ddaa33"}


def draw(report: OverheadReport, path: str) -> None:
    """Draw ranks x time: each rank's compute and waits, and under them its messages alone."""
    from matplotlib.patches import Patch

    setting = report.setting
    size = setting["world_size"]
    figure, axes = pyplot().subplots(figsize=(11, 1.2 + 0.7 * size))

    def bar(mark: Mark, height: float, colour: str) -> None:
        width = 1e3 * (mark.stop - mark.start)
        axes.barh(
            mark.rank + height, width, 0.35, 1e3 * mark.start, color=colour, edgecolor="white"
        )
        if mark.kind == "compute" and size <= 16:
            middle = 1e3 * (mark.start + mark.stop) / 2
            axes.text(
                middle, mark.rank + height, str(mark.step), ha="center", va="center", fontsize=7
            )

    # Compute last: on a GPU it goes on in other streams while one waits, and covers that.
    for mark in sorted(report.timeline, key=lambda m: m.kind, reverse=True):
        if mark.variant == "real":
            bar(mark, -0.2, _COLOURS[mark.kind])
        elif mark.kind == "wait":
            bar(mark, 0.2, _COLOURS["message"])
    axes.set_yticks(range(size), [f"rank {rank}" for rank in range(size)])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("ms since the barrier")
    axes.set_title(
        f"{setting['rotation']}, S={setting['subsequence']:,}, forward + backward, "
        f"{setting['device']}: upper bar the run, lower bar its messages alone",
        fontsize=9,
    )
    labels = ("compute, by step", "waiting for messages", "messages alone (the twin)")
    axes.legend(
        [Patch(color=c) for c in _COLOURS.values()],
        labels,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.5 / (0.7 * size)),
        ncols=3,
        fontsize=8,
        frameon=False,
    )
    save(figure, path)
    print(f"timeline: {path}")
