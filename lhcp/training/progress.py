"""Lines that a run prints while it goes."""

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lhcp.training.history import EvalRecord, StepRecord
from lhcp.training.stages import Stage, total_steps

STEPS_A_LINE = 10
"""Steps to each printed line where the output is not a terminal."""


class Progress:
    """Prints the progress of a run on rank 0.

    On a terminal each step has its line, in place. Elsewhere one step in ten has, and each stage's
    first step, those that are skipped, and the run's last; evaluations always have theirs.

    Args:
        shown: Whether this rank prints.
    """

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self.in_place = shown and sys.stdout.isatty()
        self._recent: list[float] = []
        self._stage = ""

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self.shown:
            print(("\r\x1b[K" if self.in_place else "") + text, flush=True)

    def on_start(self, done: int, folder: Path) -> None:
        """Tell of a run that goes on."""
        self._recent, self._stage = [], ""
        if done:
            self.say(f"{folder}: found a checkpoint, going on after step {done}")

    def on_passed_over(self, said: str) -> None:
        """Print which checkpoint is not taken, and why."""
        self.say(said)

    def on_step(self, record: StepRecord, stages: Sequence[Stage]) -> None:
        """Print the step's line, if it is one that has a line."""
        # The time from line to line counts evaluations and checkpoints too.
        now = time.perf_counter()
        self._recent = [*self._recent[-50:], now]
        pace = record.seconds
        if len(self._recent) > 1:
            pace = (now - self._recent[0]) / (len(self._recent) - 1)
        new_stage, self._stage = record.stage != self._stage, record.stage
        last = record.step == total_steps(stages)
        shown = new_stage or last or record.skipped or record.step % STEPS_A_LINE == 0
        if not (self.in_place or shown):
            return
        left = round((total_steps(stages) - record.step) * pace)
        packed = "" if record.documents is None else f"documents {record.documents:>3}  "
        line = (
            f"{record.stage:<10} {record.step:>5}/{total_steps(stages)}  loss {record.loss:6.4f}  "
            f"{why_skipped(record)}"
            f"grad {record.grad_norm:6.3f}  {record.tokens_per_second:>7,.0f} tok/s  "
            f"{packed}rotation {share_of(record.rotation_share)}{use_of(record)}  "
            f"ETA {left // 60}:{left % 60:02d}"
        )
        if self.in_place and not record.skipped:
            print("\r\x1b[K" + line, end="", flush=True)
        else:
            self.say(line)

    def on_eval(self, record: EvalRecord) -> None:
        """Print the evaluation's line."""
        self.say(
            f"{record.stage:<10} {record.step:>5}  held-out loss {record.loss:.4f} nats/byte, "
            f"attending in {record.mode} mode"
        )


def why_skipped(record: StepRecord) -> str:
    """Say why a step was skipped, or ""."""
    if not record.skipped:
        return ""
    finite = math.isfinite(record.loss) and math.isfinite(record.grad_norm)
    return ("SPIKE" if finite else "NOT FINITE") + ", SKIPPED  "


def share_of(share: float | None) -> str:
    """Return a share of a step in five places."""
    return "    -" if share is None else f"{share:5.1%}"


def use_of(record: StepRecord) -> str:
    """Return what a step used of its GPU, as far as that is known."""
    memory = "" if record.peak_gib is None else f"  mem {record.peak_gib:.1f} GiB"
    return memory + ("" if record.mfu is None else f"  MFU {record.mfu:.0%}")
