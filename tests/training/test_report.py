"""The report's numbers, from histories made by hand."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from rich.console import Console

from lhcp.training.history import EvalRecord, History, StepRecord
from lhcp.training.identity import Change
from lhcp.training.report import Progress, find_switch, speeds, summarize, table, write
from lhcp.training.run import Run
from lhcp.training.stages import Stage

STAGES = (
    Stage(name="lighthouse", mode="lighthouse", steps=23),
    Stage(name="dense", mode="dense", steps=14),
)


class Output(io.StringIO):
    """Standard output that is a terminal, or says that it is none."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture(params=[True, False], ids=["terminal", "no_terminal"])
def output(request: pytest.FixtureRequest) -> Output:
    return Output(request.param)


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


def shown_steps(output: Output, done: int = 0) -> list[str]:
    """Train through STAGES from step `done` on, on paper; return "stage step" of each line."""
    with redirect_stdout(output):
        progress = Progress(shown=True)
        progress.on_start(done, Path("nowhere"))
        for step in range(done + 1, 38):
            stage = "lighthouse" if step <= 23 else "dense"
            progress.on_step(StepRecord(step, stage, 3.0, 1.0, 1e-3, 0.5, 100.0, 0.1), STAGES)
            if step in (7, 23):
                progress.on_eval(EvalRecord(step, stage, "dense", 2.0))
    lines = output.getvalue().replace("\r\x1b[K", "\n").splitlines()
    return [
        f"{line.split()[0]} {line.split()[1].removesuffix('/37')}"
        + (" held-out" if "held-out" in line else "")
        for line in lines
        if line and not line.startswith("nowhere")
    ]


def test_progress_has_each_step_on_a_terminal_and_one_in_ten_elsewhere(output: Output) -> None:
    """Fails if a pipe gets a line a step, or a stage, an evaluation or the end has no line."""
    shown = shown_steps(output)
    if output.terminal:
        assert len(shown) == 37 + 2 and output.getvalue().count("\n") == 2
        return
    assert shown == [
        *("lighthouse 1", "lighthouse 7 held-out", "lighthouse 10", "lighthouse 20"),
        *("lighthouse 23 held-out", "dense 24", "dense 30", "dense 37"),
    ]


def test_a_run_that_goes_on_shows_its_first_step(output: Output) -> None:
    first = shown_steps(output, done=33)[0]
    assert first == "dense 34"


def test_the_last_line_names_the_picture(
    history: History, small_run: Run, tmp_path: Path, output: Output
) -> None:
    """Fails if the path is cut, wrapped at the terminal's width, or not the picture's."""
    folder = tmp_path / ("a_long_name_" * 12) / "[red]"
    with redirect_stdout(output):
        write(summarize(small_run, history, None, world_size=1), folder)
    picture = output.getvalue().splitlines()[-1].removeprefix("picture: ")
    assert Path(picture).read_bytes().startswith(b"\x89PNG")
