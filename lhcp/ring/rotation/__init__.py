"""Rotations: one table."""

from collections.abc import Callable

from torch import Tensor

from lhcp.comm.mesh import Ranks
from lhcp.ring.rotation.allgather import AllGather
from lhcp.ring.rotation.base import Rotation, Trip
from lhcp.ring.rotation.hierarchical import Hierarchical
from lhcp.ring.rotation.p2p import P2P

ROTATIONS: dict[str, Callable[[Trip, Tensor], Rotation]] = {
    "p2p": P2P,
    "allgather": AllGather,
    "hierarchical": Hierarchical,
}
"""Ways to bring kv round, for the one loop. "alltoall" is not one: it moves heads instead."""

NAMES = (*ROTATIONS, "alltoall")
"""What `rotation` may be on any device."""

ENGINES = ("ring_flash_attn",)
"""Whole rings of other packages, taken by name only."""


def check_rotation(name: str, ranks: Ranks, num_kv_heads: int) -> None:
    """Check that a rotation called so exists and can serve these ranks and heads.

    Raises:
        ValueError: it does not, or cannot.
    """
    if name not in (*NAMES, *ENGINES):
        known = ", ".join(("auto", *NAMES, *ENGINES))
        raise ValueError(f"rotation={name!r}: must be one of {known}")
    if name == "hierarchical" and ranks.outer is None and ranks.world_size > 1:
        raise ValueError(
            "rotation='hierarchical' needs a DeviceMesh of two axes as group, the outer across "
            'nodes, for example mesh["node", "local"]; or use rotation="allgather" or "p2p"'
        )
    if name == "alltoall" and num_kv_heads % ranks.world_size:
        fits = [w for w in range(1, num_kv_heads + 1) if num_kv_heads % w == 0]
        raise ValueError(
            f"rotation='alltoall': {num_kv_heads} kv heads do not divide over {ranks.world_size} "
            f"ranks; world sizes that fit: {', '.join(map(str, fits))}; or use "
            "rotation='allgather' or 'p2p'"
        )
