"""Rows of the latency page: the layer over its limit, and its stages."""

from bench.common.page import Page
from bench.latency.size import Measured
from bench.latency.stages import Timed

TABLE = [
    "N (S)",
    "limit f",
    "layer f eager",
    "graph",
    "over limit eager",
    "graph",
    "limit f+b",
    "layer f+b eager",
    "graph",
    "over limit eager",
    "graph",
    "dense f / f+b",
    "faster f eager / graph",
    "faster f+b eager / graph",
    "peak GiB",
]


def table_row(page: Page, found: Measured) -> None:
    """Add one row of the issue's table; "-" for what was not measured."""
    cells: list[object] = [f"{found.size.label} ({found.size.subsequence})"]
    for way in ("f", "f+b"):
        arms = [f"layer {way}", f"layer {way} graph"]
        cells.append(f"{found.limit[way]:.3f}")
        cells += [found.times.get(arm, "-") for arm in arms]
        cells += [_number(found, arm, "over_limit") for arm in arms]
    dense = [found.times.get(f"dense {way}") for way in ("f", "f+b")]
    cells.append(" / ".join(f"{x.median:.3g}" if x else "-" for x in dense))
    for way in ("f", "f+b"):
        arms = [f"layer {way}", f"layer {way} graph"]
        cells.append(" / ".join(_number(found, arm, "speedup") for arm in arms))
    cells.append(f"{found.peak_gib:.2f}")
    page.row(*cells)


def _number(found: Measured, arm: str, what: str) -> str:
    if arm not in found.times:
        return "-"
    value = getattr(found, what)(arm)
    return "-" if value is None else f"{value:.2f}x"


STAGES = ["pool", "select", "gather", "scatter", "scatter_backward", "gather_backward"]


def stage_row(page: Page, found: Measured, stages: dict[str, Timed]) -> None:
    """Add a row of each stage: ms, % of a copy's rate, % of the direction it belongs to."""
    times = found.times
    whole = {way: times.get(f"layer {way} graph", times[f"layer {way}"]) for way in ("f", "f+b")}
    forward, both = whole["f"].median, whole["f+b"].median
    cells: list[object] = [found.size.label]
    for name in STAGES:
        stage = stages[name]
        part = both - forward if name.endswith("_backward") else forward
        cells.append(f"{stage.ms.median:.3f} {stage.of_copy:.0%} {stage.ms.median / part:.0%}")
    attention = times["attention f"].median
    backward = times["attention f+b"].median - attention
    cells.append(f"{attention:.3f} {attention / forward:.0%}")
    cells.append(f"{backward:.3f} {backward / (both - forward):.0%}")
    page.row(*cells)
