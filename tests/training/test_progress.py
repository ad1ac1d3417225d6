"""Lines of a run: each step on a terminal, one in ten elsewhere."""

import io
import math
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest

from lhcp.training.history import EvalRecord, StepRecord
from lhcp.training.progress import Progress
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


def test_a_skipped_step_has_a_line_that_says_why(output: Output) -> None:
    """Fails if a step that was not taken is not seen, or a spike passes for what is not finite."""
    record = StepRecord(4, "lighthouse", 3.0, 1e4, 1e-3, 0.5, 100.0, 0.1, skipped=True)
    with redirect_stdout(output):
        progress = Progress(shown=True)
        progress.on_start(0, Path("nowhere"))
        for step in range(1, 7):
            one = {4: record, 5: replace(record, step=5, loss=math.nan)}.get(step)
            usual = StepRecord(step, "lighthouse", 3.0, 1.0, 1e-3, 0.5, 100.0, 0.1)
            progress.on_step(one or usual, STAGES)
    lines = output.getvalue().replace("\r\x1b[K", "\n").splitlines()
    said = [line for line in lines if "SKIPPED" in line]
    assert ["4/37" in said[0], "5/37" in said[1], len(said)] == [True, True, 2]
    assert "SPIKE, SKIPPED" in said[0] and "NOT FINITE, SKIPPED" in said[1]
    # They stay on a terminal, where the next line takes the place of others.
    assert output.getvalue().count("\n") == (2 if output.terminal else 3)
