"""What a rotation should cost, and which one costs least: its schedule played through on paper.

Pure functions of a shape and a `Calibration`. `predict` plays a rotation three times (as it is,
without messages, without compute), as `lhcp.measure_overhead` measures it; `choose` plays each
candidate once and takes the fastest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lhcp.cost.calibration import Calibration, Direction
from lhcp.cost.clocks import Clocks, Setting, single_seconds
from lhcp.cost.schedules import SCHEDULES
from lhcp.cost.traffic import Traffic, most_traffic
from lhcp.ring.heads import fits
from lhcp.ring.shape import AttentionShape

DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")

CANDIDATES = ("allgather", "p2p", "hierarchical", "hybrid", "hybrid_context_first")
"""What is chosen among. lhcp/METHOD.md, Rotations, says why "alltoall" is taken by name only."""
FOLLOW_DOCUMENTS = ("p2p", "hybrid", "hybrid_context_first")
"""Of these, what sends and attends to keys as far as documents reach; a gather always to all."""


@dataclass(frozen=True)
class PhasePrediction:
    """One direction, in seconds."""

    real: float
    """T, the slowest rank."""
    compute: float
    """C: with messages that take no time."""
    communication: float
    """M: with compute that takes no time."""
    step_compute: tuple[float, ...]
    """The slowest rank's compute at each step."""
    traffic: Traffic

    @property
    def exposed(self) -> float:
        """Return T - C."""
        return self.real - self.compute


@dataclass(frozen=True)
class Prediction:
    """What a rotation should cost."""

    rotation: str
    shape: AttentionShape
    forward: PhasePrediction
    backward: PhasePrediction
    single: float
    """T1: one device, forward and backward."""

    @property
    def real(self) -> float:
        """Return T, forward and backward."""
        return self.forward.real + self.backward.real

    @property
    def overhead(self) -> float:
        """Return W T / T1 - 1."""
        return self.shape.world_size * self.real / self.single - 1


def play(
    rotation: str, setting: Setting, *, compute: bool = True, communicate: bool = True
) -> Clocks:
    """Play one direction through, with or without what computing and sending take.

    Raises:
        ValueError: the model does not know the rotation.
    """
    if rotation not in SCHEDULES:
        raise ValueError(f"rotation={rotation!r}: the cost model knows {', '.join(SCHEDULES)}")
    clocks = Clocks(setting, compute=compute, communicate=communicate)
    if setting.shape.world_size == 1:
        clocks.work([single_seconds(*setting)])
    else:
        SCHEDULES[rotation](clocks)
    return clocks


def predict(rotation: str, shape: AttentionShape, calibration: Calibration) -> Prediction:
    """Play a rotation as it is, without messages and without compute, in both directions.

    Raises:
        ValueError: the model does not know the rotation, or the sizes do not fit it.
    """
    shape.layout.check_seqlen(shape.seqlen)

    def phase(direction: Direction) -> PhasePrediction:
        setting = Setting(shape, calibration, direction)
        sent = most_traffic(rotation, shape, direction)
        alone = play(rotation, setting, communicate=False)
        silent = play(rotation, setting, compute=False)
        return PhasePrediction(
            play(rotation, setting).seconds,
            alone.seconds,
            silent.seconds if shape.world_size > 1 else 0.0,
            tuple(alone.steps),
            sent,
        )

    single = sum(single_seconds(shape, calibration, d) for d in DIRECTIONS)
    return Prediction(rotation, shape, phase("forward"), phase("backward"), single)


def choose(
    shape: AttentionShape, calibration: Calibration, rotations: Sequence[str] = CANDIDATES
) -> tuple[str, str]:
    """Choose the rotation with the shortest predicted forward + backward.

    A pure function: ranks with equal arguments never differ. Those of two axes are considered
    where there are several nodes, those that share heads where these divide; at equal times the
    first name wins. One play a candidate and direction.

    Returns:
        (rotation, reason), the reason with all candidates' times.
    """
    shape.layout.check_seqlen(shape.seqlen)
    seconds = {
        rotation: sum(play(rotation, Setting(shape, calibration, d)).seconds for d in DIRECTIONS)
        for rotation in rotations
        if rotation not in SCHEDULES or fits(rotation, shape)
    }
    best = min(seconds, key=lambda rotation: seconds[rotation])
    times = ", ".join(f"{r} {1e3 * t:.2f}" for r, t in seconds.items())
    return best, f"predicted ms forward + backward on {calibration.name}: {times}"
