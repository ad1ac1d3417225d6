"""Rotations: one table."""

from lhcp.comm.mesh import Ranks
from lhcp.ring.rotation.allgather import AllGather
from lhcp.ring.rotation.base import MakeRotation
from lhcp.ring.rotation.hierarchical import Hierarchical
from lhcp.ring.rotation.p2p import P2P

ROTATIONS: dict[str, MakeRotation] = {
    "p2p": P2P,
    "allgather": AllGather,
    "hierarchical": Hierarchical,
}
"""Ways to bring kv round, for the one loop. "alltoall" is not one: it moves heads instead."""


def names() -> tuple[str, ...]:
    """Return what a plan's rotation may be, for the ring to carry out."""
    return (*ROTATIONS, "alltoall")


NAMES = names()
"""The same, as lhcp comes."""


def refuses(name: str, ranks: Ranks, num_kv_heads: int) -> str | None:
    """Return why a rotation cannot serve these ranks and heads, with what would; None if it can."""
    if name == "hierarchical" and ranks.outer is None and ranks.world_size > 1:
        return (
            "needs a DeviceMesh of two axes as group, the outer across nodes, for example "
            'mesh["node", "local"]; or use rotation="allgather" or "p2p"'
        )
    if name == "alltoall" and num_kv_heads % ranks.world_size:
        fits = [w for w in range(1, num_kv_heads + 1) if num_kv_heads % w == 0]
        return (
            f"{num_kv_heads} kv heads do not divide over {ranks.world_size} ranks; world sizes "
            f"that fit: {', '.join(map(str, fits))}; or use rotation='allgather' or 'p2p'"
        )
    return None
