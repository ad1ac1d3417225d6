"""`RingPlan`: how one attention is carried out, with every choice made."""

from dataclasses import dataclass, replace

from torch import Tensor

from lhcp.comm.layout import Layout, make_layout
from lhcp.comm.mesh import Ranks, pack_cut, unpack_cut
from lhcp.operators import pack_integers, unpack_integers
from lhcp.ring.shape import DEFAULT_TUNING, AttentionShape, Mask, Tuning

PackedPlan = tuple[str, list[int], float]
"""A plan as arguments of an operator: names; the mask, and the tuning if it is not the default one;
the scale."""


@dataclass(frozen=True)
class RingPlan:
    """What the ring is handed; it decides nothing itself."""

    ranks: Ranks
    shape: AttentionShape
    rotation: str
    """One of `lhcp.ring.rotation.NAMES`."""
    backend: str
    """One of `lhcp.ring.block.BLOCKS`."""
    scale: float
    """Factor of the logits."""

    @property
    def layout(self) -> Layout:
        """How the sequence is cut over the ranks."""
        return self.shape.layout

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

    def pack(self) -> PackedPlan:
        """Return the plan as arguments of an operator; `unpack` is the way back."""
        shape = self.shape
        words = pack_cut(self.ranks, self.layout, self.rotation, self.backend)
        integers = [int(shape.mask.causal)]
        if shape.tuning != DEFAULT_TUNING:
            integers += pack_integers(shape.tuning)
        return words, integers, self.scale

    @classmethod
    def unpack(cls, q: Tensor, k: Tensor, packed: PackedPlan) -> "RingPlan":
        """Return the plan that was packed, for q [B, n, H, D] and k [B, n, Hk, D]."""
        words, integers, scale = packed
        ranks, layout, (rotation, backend) = unpack_cut(words)
        mask = Mask(bool(integers[0]))
        tuning = unpack_integers(Tuning, integers[1:]) if integers[1:] else DEFAULT_TUNING
        shape = attention_shape(q, k, layout, mask, ranks, q.shape[1], tuning)
        return cls(ranks, shape, rotation, backend, scale)


def attention_shape(
    q: Tensor,
    k: Tensor,
    layout: Layout,
    mask: Mask,
    ranks: Ranks,
    tokens: int,
    tuning: Tuning = DEFAULT_TUNING,
) -> AttentionShape:
    """Return the shape of an attention of inputs like q [B, *, H, D] and k [B, *, Hk, D].

    Args:
        tokens: of this rank that attention runs on.
    """
    batch, _, num_heads, head_dim = q.shape
    return AttentionShape(
        seqlen=tokens * layout.world_size,
        layout=layout,
        num_heads=num_heads,
        num_kv_heads=k.shape[2],
        head_dim=head_dim,
        batch=batch,
        element_bytes=q.element_size(),
        mask=mask,
        node_size=ranks.node_size,
        tuning=tuning,
    )
