"""Spikes: steps whose gradient is far longer than the run's gradients usually are."""

import math
from collections.abc import Sequence
from statistics import median

from lhcp.training.history import StepRecord

WINDOW = 128
"""Steps that say what is usual."""
LEAST = 32
"""Of them at least, before any step is a spike."""


def spike_limit(factor: float, done: Sequence[StepRecord], stage: str) -> float:
    """Return the gradient norm above which the next step is a spike.

    It is `factor` times the median of the finite norms among the last `WINDOW` steps of the stage:
    at the switch gradients change. Skipped spikes count, so that a run whose gradients have grown
    for good finds them usual in the end. It depends on the history alone, which checkpoints hold:
    all ranks, and a run that goes on, have the same.

    Args:
        factor: Times the median; 0: no step is a spike.
        done: Records of the steps so far.
        stage: The name of the stage that the next step belongs to.
    """
    if not factor:
        return math.inf
    recent = [one.grad_norm for one in done[-WINDOW:] if one.stage == stage]
    usual = [norm for norm in recent if math.isfinite(norm)]
    return factor * median(usual) if len(usual) >= LEAST else math.inf
