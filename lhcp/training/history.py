"""What a run leaves behind and tells as it goes: records of its steps and evaluations."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lhcp.layer.module import Mode
from lhcp.training.identity import Change
from lhcp.training.selection_log import SelectionRecord
from lhcp.training.stages import Stage


@dataclass(frozen=True)
class StepRecord:
    """What one training step did."""

    step: int
    """Number of the step, from 1."""
    stage: str
    loss: float
    """Mean over all bytes that the global batch asks for, nats per byte, before the step."""
    grad_norm: float
    """Norm of the whole gradient, before clipping."""
    lr: float
    seconds: float
    tokens_per_second: float
    rotation_share: float | None
    """Share of the step that a rank waited in rotations, mean over ranks; None: not timed."""
    peak_gib: float | None = None
    """GiB that tensors of rank 0 held on its GPU at most so far; None: no GPU."""
    mfu: float | None = None
    """Model FLOPs over what the GPUs could do in bf16; None: not known."""
    documents: int | None = None
    """Documents of the global batch, each part of one that a sequence has; None: text runs on."""
    skipped: bool = False
    """Whether the weights stayed as they were, because loss or gradient was not finite, or the
    gradient a spike."""


@dataclass(frozen=True)
class EvalRecord:
    """What one evaluation on the held-out text found."""

    step: int
    """Steps done."""
    stage: str
    """The stage of the last step done."""
    mode: Mode
    """How the layers attended in this evaluation."""
    loss: float
    """Mean over the held-out tokens, nats per byte."""


@dataclass
class History:
    """All records of a run, in order; resuming restores it."""

    steps: list[StepRecord] = field(default_factory=list)
    evals: list[EvalRecord] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    """What differs from the run as it was started, by its user's word."""
    selections: list[SelectionRecord] = field(default_factory=list)
    """Of a run that diagnoses its layers."""

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "History":
        """Return the history that `asdict` made `record` of."""
        return cls(
            [StepRecord(**item) for item in record["steps"]],
            [EvalRecord(**item) for item in record["evals"]],
            [Change(**item) for item in record.get("changes", [])],
            [SelectionRecord(**item) for item in record.get("selections", [])],
        )


class Watcher(Protocol):
    """Is told of a run as it happens, on every rank."""

    def on_start(self, done: int, folder: Path) -> None:
        """Hear that the run begins; `done` steps were restored from `folder`."""

    def on_passed_over(self, said: str) -> None:
        """Hear that a checkpoint is damaged, and why the one before it is tried."""

    def on_step(self, record: StepRecord, stages: Sequence[Stage]) -> None:
        """Hear of a step that is done."""

    def on_eval(self, record: EvalRecord) -> None:
        """Hear of an evaluation."""
