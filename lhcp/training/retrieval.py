"""The passkey test of a trained model: which of the ten digits it gives, by context and depth."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import lhcp
from lhcp.comm.layout import make_layout
from lhcp.layer.mode import set_mode
from lhcp.layer.module import Mode
from lhcp.training import checkpoint
from lhcp.training.parallel import Trainee, build
from lhcp.training.passkey import DIGITS, asked_at, check_length
from lhcp.training.run import Run
from lhcp.training.trained import find_checkpoint, trained_run


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a test asks: every context at every depth, `trials` times."""

    contexts: tuple[int, ...]
    """Bytes of the text, the question included; each at most what was trained."""
    depths: tuple[float, ...] = tuple(step / 10 for step in range(11))
    """Where the key is, from 0, the start, to 1, before the question."""
    trials: int = 10
    """Texts of each cell, with fillers and digits of their own."""
    mode: Mode = "dense"
    """How the layers attend."""
    batch: int = 1
    """Texts in one forward."""
    seed: int = 0
    """Of the texts; other models are asked the same."""

    def __post_init__(self) -> None:
        for name in ("contexts", "depths"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}={values}: must be at least one, none of them twice")
        for name in ("trials", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        outside = [depth for depth in self.depths if not 0 <= depth <= 1]
        if outside:
            raise ValueError(f"depths={self.depths}: {outside} are outside 0 to 1")
        for context in self.contexts:
            check_length(context)

    def check(self, run: Run) -> None:
        """Check that a trained model can be asked this on the ranks of `run`.

        Raises:
            ValueError: a context is longer than what was trained, or does not divide.
        """
        for context in self.contexts:
            if context > run.seqlen:
                raise ValueError(
                    f"contexts={self.contexts}: {context} is longer than the {run.seqlen} tokens "
                    f"that the model was trained on; take at most {run.seqlen}"
                )
            make_layout(run.layout, run.cp).check_seqlen(context)
            if self.mode == "lighthouse":
                run.lighthouse.check_seqlen(context)
                run.lighthouse.check_chunks(make_layout(run.layout, run.cp).num_chunks)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one model answered."""

    name: str
    """Where its checkpoint was."""
    step: int
    """Steps that it was trained."""
    stages: list[tuple[str, int]]
    """Mode and steps of each stage of its training."""
    asked: Asked
    accuracy: list[list[float]]
    """Share of right digits by context, then by depth; 0.1 is chance."""
    run: dict[str, Any]

    @property
    def mean(self) -> float:
        """Mean over all cells."""
        cells = [cell for row in self.accuracy for cell in row]
        return sum(cells) / len(cells)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Found":
        """Return what `to_json` made `record` of, before JSON or after."""
        own = {k: v for k, v in record.items() if k != "mean"}
        asked: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in record["asked"].items()
        }
        own["asked"] = Asked(**asked)
        own["stages"] = [(mode, steps) for mode, steps in record["stages"]]
        return cls(**own)

    def to_json(self) -> dict[str, Any]:
        """Return everything as a JSON-ready dict, the mean too."""
        return asdict(self) | {"mean": self.mean}


def retrieve(place: Path, asked: Asked, device: torch.device) -> Found:
    """Load a checkpoint and ask it; every rank calls it, and all share each text.

    Args:
        place: A checkpoint, or a folder with checkpoints of one arm of a run.
        asked: The test.
        device: Of this rank.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it was written by another version, or a context does not fit.
    """
    path = find_checkpoint(place)
    run, done, stages = trained_run(path, dist.get_world_size())
    asked.check(run)
    trainee = build(run, device)
    checkpoint.load(path, trainee.model, trainee.optimizer)
    set_mode(trainee.model, asked.mode)
    accuracy = [
        [ask(trainee, run, asked, context, depth) for depth in asked.depths]
        for context in asked.contexts
    ]
    return Found(
        name=str(place), step=done, stages=stages, asked=asked, accuracy=accuracy, run=asdict(run)
    )


@torch.no_grad()
def ask(trainee: Trainee, run: Run, asked: Asked, context: int, depth: float) -> float:
    """Return the share of right digits of one cell, on all ranks alike."""
    drawn = [asked_at(asked.seed, depth, trial, context) for trial in range(asked.trials)]
    placement = trainee.placement
    positions = lhcp.positions(context, placement.ranks, layout=run.layout)
    positions = positions.to(placement.device)
    right = 0
    for part in batches(drawn, asked.batch):
        texts = torch.from_numpy(np.stack([text for text, _ in part])).long()
        logits = trainee.model(texts.to(placement.device)[:, positions], positions).float()
        # One rank has the last position; the others add zeros.
        last = (logits * (positions == context - 1)[:, None]).sum(1)
        dist.all_reduce(last)
        given = last[:, list(DIGITS)].argmax(1).tolist()
        right += sum(digit == answer for (_, digit), answer in zip(part, given, strict=True))
    trainee.sharded.reshard()
    return right / asked.trials


def batches(
    drawn: Sequence[tuple[np.ndarray, int]], size: int
) -> list[Sequence[tuple[np.ndarray, int]]]:
    """Return the texts in runs of at most `size`."""
    return [drawn[start : start + size] for start in range(0, len(drawn), size)]
