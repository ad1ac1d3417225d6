"""The report's numbers, from histories made by hand."""

import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from lhcp.training.history import EvalRecord, History, StepRecord
from lhcp.training.identity import Change
from lhcp.training.report import speeds, summarize, table, write
from lhcp.training.run import Run
from tests.training.test_progress import Output
from tests.training.test_switch import steps, two_stages


@pytest.fixture
def history() -> History:
    return two_stages()


def test_speeds_leave_the_first_steps_out(history: History) -> None:
    history.steps[0] = StepRecord(1, "lighthouse", 3.0, 1.0, 1e-3, 9.0, 1.0, 0.9)
    assert speeds(history)["lighthouse"].tokens_per_second == 200.0
    assert speeds(history)["dense"].rotation_share == 0.1


def test_report_is_written(history: History, small_run: Run, tmp_path: Path) -> None:
    baseline = History(steps("baseline", 1, 50.0), [EvalRecord(10, "baseline", "dense", 1.5)])
    history.steps[4] = replace(history.steps[4], skipped=True)
    history.changes.append(Change(3, "optim.betas", [0.9, 0.95], [0.9, 0.99]))
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
    speed, change = ("baseline: speed", "10.0%"), "step 3: optim.betas"
    for expected in ("+1.0000", "125%", "+0.2500", *speed, change):
        assert expected in text
    assert text.split("steps not taken")[1].split()[1] == "1"


@pytest.mark.parametrize("terminal", [True, False])
def test_the_last_line_names_the_picture(
    history: History, small_run: Run, tmp_path: Path, terminal: bool
) -> None:
    """Fails if the path is cut, wrapped at the terminal's width, or not the picture's."""
    output = Output(terminal)
    folder = tmp_path / ("a_long_name_" * 12) / "[red]"
    with redirect_stdout(output):
        write(summarize(small_run, history, None, world_size=1), folder)
    picture = output.getvalue().splitlines()[-1].removeprefix("picture: ")
    assert Path(picture).read_bytes().startswith(b"\x89PNG")
