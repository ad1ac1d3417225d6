"""Lines of a run: each step on a terminal, one in ten elsewhere."""

import io
from contextlib import redirect_stdout
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
