"""The report's numbers, from histories made by hand."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from lhcp.training.loop import EvalRecord, History, StepRecord
from lhcp.training.report import find_switch, speeds, summarize, table, write
from lhcp.training.run import Run


def steps(stage: str, first: int, speed: float) -> list[StepRecord]:
    return [StepRecord(i, stage, 3.0, 1.0, 1e-3, 0.5, speed, 0.1) for i in range(first, first + 5)]


@pytest.fixture
def history() -> History:
    return History(
        steps("lighthouse", 1, 200.0) + steps("dense", 6, 100.0),
        [
            EvalRecord(5, "lighthouse", "lighthouse", 2.0),
            EvalRecord(5, "lighthouse", "dense", 3.0),
            EvalRecord(7, "dense", "dense", 2.5),
            EvalRecord(9, "dense", "dense", 1.9),
            EvalRecord(10, "dense", "dense", 1.75),
        ],
    )


def test_switch(history: History) -> None:
    switch = find_switch(history)
    assert switch is not None
    assert (switch.step, switch.jump, switch.recovered, switch.recovered_at) == (5, 1.0, 1.25, 4)


def test_no_switch_without_a_dense_stage(history: History) -> None:
    history.evals = history.evals[:2]
    assert find_switch(history) is None


def test_speeds_leave_the_first_steps_out(history: History) -> None:
    history.steps[0] = StepRecord(1, "lighthouse", 3.0, 1.0, 1e-3, 9.0, 1.0, 0.9)
    assert speeds(history)["lighthouse"].tokens_per_second == 200.0
    assert speeds(history)["dense"].rotation_share == 0.1


def test_report_is_written(history: History, small_run: Run, tmp_path: Path) -> None:
    baseline = History(steps("baseline", 1, 50.0), [EvalRecord(10, "baseline", "dense", 1.5)])
    summary = summarize(small_run, history, baseline, world_size=2, sample="def f(", overhead=None)
    write(summary, tmp_path)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "report.json").read_text())
    assert record["switch"]["jump"] == 1.0 and record["baseline_final"] == 1.5
    assert record["sample"] == "def f("
    assert len(record["history"]["steps"]) == 10
    console = Console(file=io.StringIO(), width=100)
    console.print(table(summary))
    text = console.file.getvalue()
    for expected in ("+1.0000", "125%", "+0.2500", "baseline: speed", "10.0%"):
        assert expected in text
