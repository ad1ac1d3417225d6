"""Rotations: one table."""

from lhcp.comm.mesh import Ranks
from lhcp.ring.heads import SHARE_HEADS, TWO_AXES, sharing_ranks
from lhcp.ring.rotation.allgather import AllGather
from lhcp.ring.rotation.base import MakeRotation
from lhcp.ring.rotation.hierarchical import Hierarchical
from lhcp.ring.rotation.p2p import P2P

ROTATIONS: dict[str, MakeRotation] = {
    "p2p": P2P,
    "allgather": AllGather,
    "hierarchical": Hierarchical,
}
"""Ways to bring kv round, for the one loop. Those of `SHARE_HEADS` are the loop over one of these
with an exchange of heads around it, or nothing but that."""


def names() -> tuple[str, ...]:
    """Return what a plan's rotation may be, for the ring to carry out."""
    return (*ROTATIONS, *SHARE_HEADS)


NAMES = names()
"""The same, as lhcp comes."""


def refuses(name: str, ranks: Ranks, num_heads: int) -> str | None:
    """Return why a rotation cannot serve these ranks and heads, with what would; None if it can."""
    if name in TWO_AXES and ranks.outer is None and ranks.world_size > 1:
        return (
            "needs a DeviceMesh of two axes as group, the outer across nodes, for example "
            'mesh["node", "local"]; or use rotation="allgather" or "p2p"'
        )
    sharing = sharing_ranks(name, ranks.world_size, ranks.node_size)
    if num_heads % sharing:
        fits = [w for w in range(1, num_heads + 1) if num_heads % w == 0]
        what = {"alltoall": "ranks", "hybrid": "ranks of a node"}.get(name, "nodes")
        return (
            f"{num_heads} query heads do not divide over {sharing} {what}; numbers that fit: "
            f"{', '.join(map(str, fits))}; or use rotation='allgather' or 'p2p'"
        )
    return None
