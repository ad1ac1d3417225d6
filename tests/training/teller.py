"""A watcher of training that keeps what it is told."""

from pathlib import Path
from typing import Any

from lhcp.training.history import EvalRecord, StepRecord


class Teller:
    """Keeps words, and the losses of each stage; can stop at a step, as a crash would."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after, self.steps, self.said = stop_after, 0, ""
        self.losses: dict[str, list[float]] = {}

    def say(self, text: str) -> None:
        self.said += text + "\n"

    def on_start(self, done: int, folder: Path) -> None:
        pass

    def on_passed_over(self, said: str) -> None:
        self.say(said)

    def on_step(self, record: StepRecord, stages: Any) -> None:
        self.steps += 1
        self.losses.setdefault(record.stage, []).append(record.loss)
        if self.steps == self.stop_after:
            raise InterruptedError

    def on_eval(self, record: EvalRecord) -> None:
        pass
