"""Watchers that write a run's metrics: JSON lines always, TensorBoard and wandb where asked for."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from lhcp.training.history import EvalRecord, StepRecord, Watcher
from lhcp.training.profiling import Profile
from lhcp.training.progress import Progress
from lhcp.training.run import Run
from lhcp.training.stages import Stage

NAME = "metrics.jsonl"
GROUPS = {"tokens_per_second": "speed", "seconds": "speed", "rotation_share": "speed"}
GROUPS |= {"peak_gib": "speed", "mfu": "speed"}
"""Where a number of a step is shown, if not under "train"."""


class Watchers:
    """Several watchers as one."""

    def __init__(self, *watchers: Watcher) -> None:
        self._watchers = watchers

    def on_start(self, done: int, folder: Path) -> None:
        """Tell all."""
        for watcher in self._watchers:
            watcher.on_start(done, folder)

    def on_passed_over(self, said: str) -> None:
        """Tell all."""
        for watcher in self._watchers:
            watcher.on_passed_over(said)

    def on_step(self, record: StepRecord, stages: Sequence[Stage]) -> None:
        """Tell all."""
        for watcher in self._watchers:
            watcher.on_step(record, stages)

    def on_eval(self, record: EvalRecord) -> None:
        """Tell all."""
        for watcher in self._watchers:
            watcher.on_eval(record)


def scalars(record: StepRecord | EvalRecord) -> dict[str, float]:
    """Return the numbers of a record, by the names that TensorBoard and wandb show."""
    if isinstance(record, EvalRecord):
        return {f"heldout/{record.mode}": record.loss}
    return {
        f"{GROUPS.get(name, 'train')}/{name}": float(value)
        for name, value in asdict(record).items()
        if name not in ("step", "stage") and value is not None
    }


class JsonLines:
    """Writes each step and evaluation as a line of metrics.jsonl, beside the checkpoints.

    A run that goes on keeps the lines of the steps that it goes on from, and no others. A disk that
    is full ends the file, not the run.

    Args:
        say: is told of that.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._file: TextIO | None = None

    def on_start(self, done: int, folder: Path) -> None:
        """Open the file."""
        path = folder / NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            kept = lines_until(path, done)
            self._file = open(path, "w", encoding="utf-8", buffering=1)  # noqa: SIM115
            self._file.writelines(kept)
        except OSError as error:
            self._give_up(error)

    def on_passed_over(self, said: str) -> None:
        """Do nothing."""

    def on_step(self, record: StepRecord, stages: Sequence[Stage]) -> None:
        """Write the step."""
        self._write({"kind": "step", **asdict(record)})

    def on_eval(self, record: EvalRecord) -> None:
        """Write the evaluation."""
        self._write({"kind": "eval", **asdict(record)})

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(record) + "\n")
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._file = None
        self._say(f"{NAME} is not written on: {error}")


def lines_until(path: Path, done: int) -> list[str]:
    """Return the whole lines of a metrics file whose steps are at most `done`."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            # The last line of a run that was cut off.
            continue
        if record["step"] <= done and line.endswith("\n"):
            kept.append(line)
    return kept


class TensorBoard:
    """Writes a run's numbers for TensorBoard, in `tensorboard` beside the checkpoints."""

    def __init__(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._make: Callable[..., Any] = SummaryWriter
        self._writer: Any = None

    def on_start(self, done: int, folder: Path) -> None:
        """Open the log; what a run that goes on will do again is dropped."""
        self._writer = self._make(str(folder / "tensorboard"), purge_step=done + 1)

    def on_passed_over(self, said: str) -> None:
        """Do nothing."""

    def on_step(self, record: StepRecord, stages: Sequence[Stage]) -> None:
        """Write the step."""
        self._write(record)

    def on_eval(self, record: EvalRecord) -> None:
        """Write the evaluation."""
        self._write(record)

    def close(self) -> None:
        """Close the log."""
        if self._writer is not None:
            self._writer.close()

    def _write(self, record: StepRecord | EvalRecord) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record.step)


class WandB:
    """Sends a run's numbers to Weights & Biases, in project "lhcp" unless WANDB_PROJECT names one.

    A run that goes on in the same folder goes on there too. Its own variables, as WANDB_MODE, hold.
    """

    def __init__(self, run: Run) -> None:
        import wandb

        self._wandb: Any = wandb
        self._run = run
        self._log: Any = None

    def on_start(self, done: int, folder: Path) -> None:
        """Open the run."""
        where = folder.resolve()
        self._log = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "lhcp"),
            name=f"{self._run.name} {folder.name}",
            id=hashlib.sha256(str(where).encode()).hexdigest()[:16],
            resume="allow",
            dir=str(where),
            config=asdict(self._run),
        )

    def on_passed_over(self, said: str) -> None:
        """Do nothing."""

    def on_step(self, record: StepRecord, stages: Sequence[Stage]) -> None:
        """Send the step."""
        self._log.log(scalars(record), step=record.step)

    def on_eval(self, record: EvalRecord) -> None:
        """Send the evaluation, with the step that is done."""
        self._log.log(scalars(record), step=record.step)

    def close(self) -> None:
        """Finish the run."""
        if self._log is not None:
            self._log.finish()


@contextmanager
def written(run: Run, progress: Progress, rank: int) -> Iterator[Watcher]:
    """Yield what watches one arm of a run: its progress, and what else the run asks for.

    Args:
        run: The run.
        progress: Of this rank.
        rank: Of this process; 0 alone writes metrics, all write their own profile.

    Raises:
        ImportError: a log's package is missing.
    """
    makers: dict[str, Callable[[], Any]] = {
        "tensorboard": TensorBoard,
        "wandb": lambda: WandB(run),
    }
    others: list[Any] = []
    if run.profile:
        others.append(Profile(run.profile, rank, progress.say))
    if rank == 0:
        try:
            others += [JsonLines(progress.say), *(makers[name]() for name in run.logs)]
        except ImportError as error:
            install = f"pip install {' '.join(run.logs)}"
            raise ImportError(f"logs={run.logs}: {error}; {install}") from error
    with ExitStack() as stack:
        for other in others:
            stack.callback(other.close)
        yield Watchers(progress, *others)
