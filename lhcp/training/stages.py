"""What a step is: its stage and its learning rate, as pure functions of the step's number."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lhcp.layer.module import Mode


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of `steps` training steps in one attention mode."""

    name: str
    mode: Mode
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps={self.steps} of stage {self.name!r}: must not be negative")


def total_steps(stages: Sequence[Stage]) -> int:
    """Return the steps of all stages."""
    return sum(stage.steps for stage in stages)


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """Return the stage that step `step` (from 0) belongs to.

    Raises:
        ValueError: the stages end before `step`.
    """
    end = 0
    for stage in stages:
        end += stage.steps
        if step < end:
            return stage
    raise ValueError(f"step={step}: the stages have steps 0 to {end - 1}")


def completed(stages: Sequence[Stage], done: int) -> tuple[Stage, ...]:
    """Return the stages as far as `done` steps take them, without those of no step."""
    found = []
    for stage in stages:
        steps = min(stage.steps, done)
        done -= steps
        if steps:
            found.append(replace(stage, steps=steps))
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser and its learning rates; the defaults are the paper's."""

    kind: Literal["adamw", "sgd"] = "adamw"
    lr: float = 2e-3
    """Rate after the warm-up."""
    warmup_steps: int = 2000
    """Steps over which the rate rises linearly to `lr`."""
    decay: Literal["constant", "cosine", "linear"] = "constant"
    """Course after the warm-up. A decaying rate leaves the dense stage little to recover with."""
    final_fraction: float = 0.1
    """Share of `lr` left at the last step, where the rate decays."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of adamw."""
    weight_decay: float = 0.1
    """Of adamw: decay of matrices; norms do not decay."""
    clip: float = 1.0
    """Largest norm of the whole gradient; longer ones are shortened to it."""

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr={self.lr}: must be positive and finite, for example 1e-3")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps}: must not be negative")
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"final_fraction={self.final_fraction}: must lie in 0 to 1")
        if self.kind == "sgd":
            # A field's default stands for "not given": sgd has neither.
            for name in ("betas", "weight_decay"):
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ValueError(
                        f"{name}={getattr(self, name)}: sgd is plain, without decay and momentum; "
                        "leave it out, or take kind='adamw'"
                    )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(
                f"betas={self.betas}: must be two numbers in 0 to below 1, for example 0.9 0.95"
            )
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"weight_decay={self.weight_decay}: must be finite and not negative, as 0.1"
            )
        if not self.clip > 0:
            raise ValueError(f"clip={self.clip}: must be positive; inf clips nothing")

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of step `step` (from 0) of a run of `steps`."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.decay == "constant":
            return self.lr
        done = (step - self.warmup_steps) / max(steps - 1 - self.warmup_steps, 1)
        done = min(done, 1.0)
        left = 1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.lr * (self.final_fraction + (1 - self.final_fraction) * left)
