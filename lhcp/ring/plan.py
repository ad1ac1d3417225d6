"""`RingPlan`: how one attention is carried out, with every choice made."""

from dataclasses import dataclass, replace

from lhcp.comm.layout import Layout, make_layout
from lhcp.comm.mesh import Ranks, pack_cut, traced, unpack_cut
from lhcp.ring.heads import RING, shape_left, sharing_ranks
from lhcp.ring.shape import AttentionShape

PackedPlan = tuple[str, list[int], float]
"""A plan as arguments of an operator: names; the shape; the scale."""


@dataclass(frozen=True)
class RingPlan:
    """What the ring is handed; it decides nothing itself."""

    ranks: Ranks
    shape: AttentionShape
    rotation: str
    """A name of `lhcp.ring.rotation`, or of a package's ring, which the layer carries out."""
    backend: str
    """One of `lhcp.ring.block.BLOCKS`."""
    scale: float
    """Factor of the logits."""
    traced: bool = False
    """Whether a graph has it, which may run with sizes that ranks have not compared."""

    @property
    def layout(self) -> Layout:
        """How the sequence is cut over the ranks."""
        return self.shape.layout

    @property
    def chosen(self) -> dict[str, str]:
        """What "auto" became, by name."""
        return {"rotation taken": self.rotation, "backend taken": self.backend}

    def on_one_rank(self, num_heads: int, num_kv_heads: int) -> "RingPlan":
        """Return the plan of the whole sequence on one rank, of so many heads."""
        shape = replace(
            self.shape,
            layout=make_layout(self.layout.name, 1),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            node_size=None,
        )
        return replace(self, ranks=Ranks(), shape=shape)

    @property
    def sharing_ranks(self) -> int:
        """How many ranks share the heads of their tokens; 1 where the rotation exchanges none."""
        return sharing_ranks(self.rotation, self.shape.world_size, self.ranks.node_size)

    def after_exchange(self) -> "RingPlan":
        """Return the plan of what is left once heads are exchanged: of the sequence, in a ring."""
        group = {"hybrid": self.ranks.outer, "hybrid_context_first": self.ranks.inner}
        ranks = Ranks(group.get(self.rotation), allocate=self.ranks.allocate)
        shape = shape_left(self.rotation, self.shape)
        return replace(self, ranks=ranks, shape=shape, rotation=RING)

    def pack(self) -> PackedPlan:
        """Return the plan as arguments of an operator; `unpack` is the way back."""
        words = pack_cut(self.ranks, self.layout, self.rotation, self.backend, traced())
        return words, self.shape.pack(), self.scale

    @classmethod
    def unpack(cls, packed: PackedPlan) -> "RingPlan":
        """Return the plan that was packed."""
        words, integers, scale = packed
        ranks, layout, (rotation, backend, graph) = unpack_cut(words)
        shape = AttentionShape.unpack(layout, integers)
        return cls(ranks, shape, rotation, backend, scale, bool(graph))
