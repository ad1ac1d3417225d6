"""What the rotation costs, in one sentence, and what to change."""

from dataclasses import dataclass
from typing import Literal

from lhcp.measure.timings import PhaseReport, is_noise

Binds = Literal["host", "messages", "blocks"]

SAID: dict[Binds, str] = {
    "host": "the host binds",
    "messages": "messages bind",
    "blocks": "the blocks bind: on W ranks they are smaller, and slower, than on one device",
}

CHANGE: dict[Binds, str] = {
    "host": "lhcp.graphed(model) launches a layer at once; or give each rank more tokens",
    "messages": "name another rotation, or measure `lhcp calibrate` and let its table choose; with "
    "NCCL try TORCH_NCCL_HIGH_PRIORITY=1; or share a sequence over fewer ranks",
    "blocks": "share a sequence over fewer ranks, or give each rank more tokens; another backend "
    "may do better on small blocks",
}


@dataclass(frozen=True)
class Step:
    """A training step of the user's."""

    seconds: float
    num_layers: int
    """Attention layers in it."""

    def __post_init__(self) -> None:
        if not (self.seconds > 0 and self.num_layers > 0):
            raise ValueError(
                f"step_seconds={self.seconds}, num_layers={self.num_layers}: must be positive"
            )


@dataclass(frozen=True)
class Verdict:
    """What the rotation costs; printed, it is a sentence and what to change."""

    sentence: str
    change: str
    """What to change, or "" where there is nothing to gain."""
    share: float
    """What it adds to what was measured, over one device / W, or over the same without messages."""
    error: float | None
    """Half the width of a 95% interval of the share; None: too few repeats."""
    seconds: float
    """What it adds, of one call."""
    binds: Binds | None
    """What sets the pace of what is added; None where nothing is to be seen."""

    def __str__(self) -> str:
        """Return the sentence, and what to change below it."""
        return self.sentence + (f"\nTo change it: {self.change}." if self.change else "")


def judge(
    phase: PhaseReport, of: str, *, extrapolated: bool = False, step: Step | None = None
) -> Verdict:
    """Return the verdict of a measurement.

    Args:
        phase: forward and backward in one go.
        of: what was measured, in words.
        extrapolated: whether one device's time was measured on a shorter sequence.
        step: the training step that it is a part of.
    """
    if phase.world_size == 1:
        return Verdict("One rank: nothing rotates, and nothing is lost.", "", 0.0, None, 0.0, None)
    against = f"{of} on one device / {phase.world_size}"
    if phase.overhead is not None and phase.single is not None:
        share, error = phase.overhead, phase.overhead_error
        base = phase.single.median / phase.world_size
        if extrapolated:
            against += " (one device: scaled up from a shorter sequence)"
    else:
        base = phase.compute.median
        share = phase.exposed / base
        error = None if phase.exposed_error is None else phase.exposed_error / base
        against = f"{of} without messages"
    noise = is_noise(share, error)
    binds: Binds | None = None if noise or share < 0 else _binds(phase, share * base)
    if phase.host_sets_the_pace:
        binds = "host"
    doubt = "(too few repeats to say how sure)" if error is None else f"+- {error:.1%}"
    if noise:
        text = f"The rotation's cost is not distinguishable from 0: {share:+.1%} {doubt} of "
    elif share < 0:
        text = f"The rotation costs nothing: {share:+.1%} {doubt} of "
    else:
        text = f"The rotation costs {share:.1%} {doubt} of "
    text += against
    if step is not None:
        # Of noise, what it may be at most.
        most = share + (error or 0.0) if noise else share
        taken = max(most, 0.0) * base * step.num_layers / step.seconds
        part = f"{taken:.1%}" if taken <= 1 else "more than all"
        text += f"; {'at most ' if noise else ''}{part} of your step of {step.seconds:.3g} s"
    if binds is not None:
        text += f"; {SAID[binds]}"
    change = CHANGE[binds] if binds is not None else ""
    return Verdict(f"{text}.", change, share, error, share * base, binds)


def _binds(phase: PhaseReport, added: float) -> Binds:
    """Return what most of the seconds that the rotation adds are made of."""
    exposed = not is_noise(phase.exposed, phase.exposed_error) and phase.exposed > added / 2
    return "messages" if exposed else "blocks"
