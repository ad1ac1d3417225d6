"""Which ranks share heads, and what each attends to once they have: integers alone.

Ranks that share heads exchange tokens for heads: each then holds the tokens of all of them, of its
part of the heads. What is left of the sequence, over the other ranks, is a ring attention of fewer
ranks, longer chunks and fewer heads, in the same layout:

    zigzag, two nodes of two ranks, chunks 0 7 | 1 6 || 2 5 | 3 4
    "hybrid": the two ranks of a node; the nodes hold 0 1 6 7 and 2 3 4 5: zigzag of two ranks
    "hybrid_context_first": ranks 0 1 give one half of the heads to rank 0 and the other to rank 2,
    ranks 2 3 to ranks 1 and 3: the first node holds 0 1 6 7 and 2 3 4 5, of the first half

Query heads divide over the ranks that share them. Where kv heads do not, some are on several ranks,
each with its part of the group's queries.
"""

from dataclasses import replace
from math import gcd
from operator import index
from typing import NamedTuple

from lhcp.comm.layout import make_layout
from lhcp.ring.shape import AttentionShape

SHARE_HEADS = ("alltoall", "hybrid", "hybrid_context_first")
"""Rotations that begin and end with an exchange."""

TWO_AXES = ("hierarchical", "hybrid", "hybrid_context_first")
"""Rotations that want a mesh of two axes, the outer across nodes."""

RING = "p2p"
"""What carries the rest of the sequence round. By the model a gather is slower at every size but
dense sequences of 1M and more inside a node, where it gains 0.4%."""


class Partners(NamedTuple):
    """Whom one rank exchanges with, counted among `exchange_ranks`, ascending."""

    to: tuple[int, ...]
    """For each part of the heads the rank that attends with it."""
    sources: tuple[int, ...]
    """The ranks whose tokens come, in the order of their chunks."""


def sharing_ranks(rotation: str, world_size: int, node_size: int | None) -> int:
    """Return how many ranks share the heads of their tokens; 1 for other rotations."""
    inner = world_size if node_size is None else node_size
    return {
        "alltoall": world_size,
        "hybrid": inner,
        "hybrid_context_first": world_size // inner,
    }.get(rotation, 1)


def partners(rotation: str, rank: int, world_size: int, node_size: int | None) -> Partners:
    """Return whom `rank` exchanges with.

    Context first: rank p holds a part of the run of chunks that rank p // nodes of every node
    attends to, each with its own heads.
    """
    sharing = sharing_ranks(rotation, world_size, node_size)
    if rotation != "hybrid_context_first":
        return Partners(tuple(range(sharing)), tuple(range(sharing)))
    inner = world_size // sharing
    to = tuple(node * inner + rank // sharing for node in range(sharing))
    index = rank % inner
    return Partners(to, tuple(range(index * sharing, (index + 1) * sharing)))


def exchange_ranks(rotation: str, rank: int, world_size: int, node_size: int | None) -> range:
    """Return the ranks of the group in which `rank` exchanges: those of its node, or all."""
    if rotation != "hybrid" or node_size is None:
        return range(world_size)
    return range(rank - rank % node_size, rank - rank % node_size + node_size)


def ring_ranks(rotation: str, rank: int, world_size: int, node_size: int | None) -> range:
    """Return the ranks of the ring that `rank` is left in, in the order of the ring."""
    sharing = sharing_ranks(rotation, world_size, node_size)
    if rotation == "hybrid":
        return range(rank % sharing, world_size, sharing)
    first = rank - rank % (world_size // sharing)
    return range(first, first + world_size // sharing)


def part_of_heads(rotation: str, rank: int, world_size: int, node_size: int | None) -> int:
    """Return which part of the heads `rank` attends with."""
    sharing = sharing_ranks(rotation, world_size, node_size)
    return rank // (world_size // sharing) if rotation == "hybrid_context_first" else rank % sharing


def kv_copies(num_heads: int, num_kv_heads: int, sharing: int) -> int:
    """Return on how many places each kv head is once the query heads are shared out equally.

    8 query heads of 2 kv heads over 4 ranks: two ranks a kv head. 12 of 3 over 2: the first rank
    has kv heads 0 and half of 1, so each is in two halves.
    """
    # index makes a symbolic size a number: torch.compile traces this and knows no gcd of others.
    group = index(num_heads // num_kv_heads)
    return group // gcd(group, index(num_heads // sharing))


def fits(rotation: str, shape: AttentionShape) -> bool:
    """Return whether the shape has the nodes and the heads that a rotation needs."""
    if rotation in TWO_AXES and shape.num_nodes == 1:
        return False
    return shape.num_heads % sharing_ranks(rotation, shape.world_size, shape.node_size) == 0


def shape_left(rotation: str, shape: AttentionShape) -> AttentionShape:
    """Return the attention that the ranks of one ring are left with after the exchange.

    Raises:
        ValueError: the query heads do not divide over the ranks that share them.
    """
    sharing = sharing_ranks(rotation, shape.world_size, shape.node_size)
    if shape.num_heads % sharing:
        raise ValueError(
            f"rotation={rotation!r}: {shape.num_heads} query heads do not divide over {sharing}"
        )
    copies = kv_copies(shape.num_heads, shape.num_kv_heads, sharing)
    ranks = shape.world_size // sharing
    return replace(
        shape,
        layout=make_layout(shape.layout.name, ranks),
        num_heads=shape.num_heads // sharing,
        num_kv_heads=shape.num_kv_heads * copies // sharing,
        # A ring across nodes has one rank on each.
        node_size=1 if rotation == "hybrid" and ranks > 1 else None,
    )
