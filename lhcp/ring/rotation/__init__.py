"""Rotations: one table."""

from collections.abc import Callable

from torch import Tensor

from lhcp.ring.rotation.allgather import AllGather
from lhcp.ring.rotation.base import Rotation, Trip
from lhcp.ring.rotation.p2p import P2P

ROTATIONS: dict[str, Callable[[Trip, Tensor], Rotation]] = {"p2p": P2P, "allgather": AllGather}


def choose_rotation(name: str) -> str:
    """Return the name of a rotation, "auto" resolved.

    Raises:
        ValueError: no rotation has this name.
    """
    if name == "auto":
        return "allgather"
    if name not in ROTATIONS:
        raise ValueError(f"rotation={name!r}: must be one of auto, {', '.join(ROTATIONS)}")
    return name
