"""The latency bench's output: card, Markdown tables on stdout and in a dated file, JSON last."""

import dataclasses
import datetime
import json
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from harness import commit
from latency_size import Measured
from latency_stages import Timed


def card(copy: float, matmul: float, revision: str) -> dict[str, Any]:
    """Hardware, versions, commit and measured ceilings."""
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "commit": revision or commit(),
        "copy_tb_s": round(copy / 1e12, 2),
        "matmul_bf16_tflop_s": round(matmul / 1e12),
        "command": shlex.join(["python", *sys.argv]),
    }


class Page:
    """Lines that are printed as they come and kept for the result file."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.lines: list[str] = []
        self.records: dict[str, Any] = {"card": facts}
        self.wrong: list[str] = []
        self.line("# One layer on one GPU")
        self.line("")
        for name, value in facts.items():
            self.line(f"- {name}: {value}")

    def line(self, text: str) -> None:
        print(text, flush=True)
        self.lines.append(text)

    def section(self, title: str, header: list[str], note: str) -> None:
        """Open a table; its rows follow by `row`."""
        for text in ("", f"## {title}", note, "", *_head(header)):
            self.line(text)

    def row(self, *cells: object) -> None:
        self.line(f"| {' | '.join(map(str, cells))} |")

    def refuse(self, what: str, why: object) -> None:
        """Print no number for `what`; the bench then ends with status 1."""
        text = " ".join(str(why).split())
        self.wrong.append(f"{what}: {text}")
        self.line(f"| {what} | WRONG, no number: {text} |")

    def record(self, section: str, value: Any) -> None:
        self.records.setdefault(section, []).append(value)

    def close(self, out: Path | None) -> None:
        """Print the JSON line and write the file."""
        self.records["wrong"] = self.wrong
        if out is not None:
            out.write_text("\n".join(self.lines) + "\n")
        print(json.dumps(self.records, default=_plain), flush=True)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)


def _head(names: list[str]) -> list[str]:
    return [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]


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
    """One row of the issue's table; "-" for what was not measured."""
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
    """Each stage: ms, % of a copy's rate, % of the direction it belongs to."""
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
