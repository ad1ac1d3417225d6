"""The merge of partial attentions, by their share of the softmax, and the sum of partial gradients.

A part covers a run of queries and a run of heads; a query is merged from the parts that cover it.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lhcp.ring.rotation.base import wide

_HAS_TRITON = importlib.util.find_spec("triton") is not None

Run = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """A call's result for [start, stop) of the queries and of the heads."""

    rows: Run
    heads: Run
    x: Tensor
    """[B, rows, heads, D], any float dtype; D lies together."""
    lse: Tensor | None = None
    """[B, heads, rows] of an attention; None of a gradient."""

    @staticmethod
    def whole(x: Tensor, lse: Tensor | None = None) -> "Part":
        """Return the part that covers everything."""
        return Part((0, x.shape[1]), (0, x.shape[2]), x, lse)

    def of(self, x: Tensor) -> Tensor:
        """The queries and heads of this part, of [B, S, H, D]."""
        return x[:, slice(*self.rows), slice(*self.heads)]

    def of_lse(self, lse: Tensor) -> Tensor:
        """The queries and heads of this part, of [B, H, S]."""
        return lse[:, slice(*self.heads), slice(*self.rows)]


def merge(out: Tensor, lse: Tensor, parts: Sequence[Part]) -> None:
    """Merge the attentions of queries to parts of the keys into (out, lse).

    With l = logsumexp of the lse_i that cover a query: out = sum of exp(lse_i - l) out_i, summed
    wide and rounded once (arXiv 2112.05682). A query that nothing covers, or with every lse_i
    -inf, attended to no key: it is 0, its lse -inf. One kernel on a GPU: each part is read once.

    Args:
        out: [B, S, H, D], any float dtype, written; it may be the whole of a part.
        lse: [B, H, S], float32 (float64 for float64 inputs), written; so may this.
        parts: with lse of the dtype of `lse`.
    """
    if out.device.type == "cuda" and lse.dtype == torch.float32 and _HAS_TRITON:
        from lhcp.ring.merge.merge_kernel import merge_fused

        merge_fused(out, lse, parts)
        return
    total = torch.full_like(lse, -torch.inf)
    for part in parts:
        assert part.lse is not None
        so_far = part.of_lse(total)
        so_far.copy_(torch.logaddexp(so_far, part.lse))
    # Nothing weighs nothing: exp(-inf - 0), not exp(-inf - -inf).
    base = total.masked_fill(total == -torch.inf, 0.0)
    sum_ = lse.new_zeros(out.shape)
    for part in parts:
        assert part.lse is not None
        weight = (part.lse - part.of_lse(base)).exp().transpose(1, 2)[..., None]
        part.of(sum_).add_(part.x * weight)
    out.copy_(sum_)
    lse.copy_(total)


def add(out: Tensor, parts: Sequence[Part]) -> None:
    """Sum the parts that cover a query into `out`: wide, rounded once. One kernel on a GPU.

    Args:
        out: [B, S, H, D], any float dtype, written; it may be the whole of a part.
        parts: their lse is not read.
    """
    if out.device.type == "cuda" and out.dtype != torch.float64 and _HAS_TRITON:
        from lhcp.ring.merge.merge_kernel import add_fused

        add_fused(out, parts)
        return
    sum_ = torch.zeros_like(out, dtype=wide(out.dtype))
    for part in parts:
        part.of(sum_).add_(part.x)
    out.copy_(sum_)
