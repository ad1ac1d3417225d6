"""The short stage: what all that a seed does begins from, trained once, on shorter sequences."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Short:
    """Dense training on sequences shorter than the run's, before all else: context extension.

    Short sequences teach a model in fewer and cheaper steps what length does not change. The run
    begins from its weights and its optimiser, with a warm-up of its own; `rope_theta` is the
    model's in both, so it should be wide enough for the longer sequences.
    """

    steps: int = 0
    """Steps of it; 0: none, the run begins from new weights."""
    seqlen: int = 2048
    """Tokens of a sequence; at most the run's."""
    global_batch: int = 32
    """Sequences in one step over all ranks."""
    lr: float = 1e-3
    """Rate after the warm-up, constant; the rest of the optimiser is the run's."""
    out: str = ""
    """Folder that its checkpoints are in, by seed; empty: the run's. Runs that differ in what
    comes after it alone may share them."""

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"short.steps={self.steps}: must not be negative; 0 is none")
        for name in ("seqlen", "global_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"short.{name}={getattr(self, name)}: must be at least 1")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"short.lr={self.lr}: must be positive and finite, for example 1e-3")
