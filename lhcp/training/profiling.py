"""A trace of a few steps by torch's profiler, as a watcher: what `--profile` asks for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from lhcp.training.history import EvalRecord, StepRecord
from lhcp.training.stages import Stage

BEFORE = 4
"""Steps before the trace: compiling, allocating, recording graphs; the last starts the profiler."""


class Profile:
    """Traces `steps` steps after the first few; each rank writes profile/rank0.json.gz.

    Open it with ui.perfetto.dev: it names a layer's stages, as "lhcp::ring_forward::wait[1]".

    Args:
        steps: how many; evaluations between them are in the trace too.
        rank: of this process.
        say: is told where it is, on rank 0.
    """

    def __init__(self, steps: int, rank: int, say: Any) -> None:
        self._steps, self._rank, self._say = steps, rank, say
        self._profiler: Any = None
        self._file = Path()
        self._seen = 0

    def on_start(self, done: int, folder: Path) -> None:
        """Make ready."""
        self._file = folder / "profile" / f"rank{self._rank}.json.gz"
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(
                wait=BEFORE - 1, warmup=1, active=self._steps, repeat=1
            ),
            on_trace_ready=self._write,
        )
        self._profiler.start()

    def on_passed_over(self, said: str) -> None:
        """Do nothing."""

    def on_step(self, record: StepRecord, stages: Sequence[Stage]) -> None:
        """Count the step."""
        self._seen += 1
        if self._profiler is not None:
            self._profiler.step()

    def on_eval(self, record: EvalRecord) -> None:
        """Do nothing."""

    def close(self) -> None:
        """End a trace that is under way, or say that there was none."""
        if self._profiler is None:
            return
        if self._seen <= BEFORE:
            self._say(f"profile: no trace, the run had {self._seen} steps; it takes {BEFORE + 1}")
        self._profiler.stop()
        self._profiler = None

    def _write(self, profiler: Any) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self._file))
        self._say(f"profile of {self._steps} steps: {self._file} (open it with ui.perfetto.dev)")
