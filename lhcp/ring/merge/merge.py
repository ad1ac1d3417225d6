"""The merge of partial attentions, by their share of the softmax, and the sum of partial gradients.

A partial covers a run of queries and a run of heads; a query is merged from those that cover it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lhcp.operators import HAS_TRITON
from lhcp.precision import wide
from lhcp.ring.merge.partial import Partial


def merge(out: Tensor, lse: Tensor, partials: Sequence[Partial]) -> None:
    """Merge the attentions of queries to parts of the keys into (out, lse).

    With l = logsumexp of the lse_i that cover a query: out = sum of exp(lse_i - l) out_i, summed
    wide and rounded once (arXiv 2112.05682). A query that nothing covers, or with every lse_i
    -inf, attended to no key: it is 0, its lse -inf. One kernel on a GPU: each partial is read once.

    Args:
        out: [B, S, H, D], any float dtype, written; it may be the whole of a partial.
        lse: [B, H, S], float32 (float64 for float64 inputs), written; so may this.
        partials: with lse of the dtype of `lse`.
    """
    if out.device.type == "cuda" and lse.dtype == torch.float32 and HAS_TRITON:
        from lhcp.ring.merge.merge_kernel import merge_fused

        merge_fused(out, lse, partials)
        return
    total = torch.full_like(lse, -torch.inf)
    for partial in partials:
        assert partial.lse is not None
        so_far = partial.of_lse(total)
        so_far.copy_(torch.logaddexp(so_far, partial.lse))
    # Nothing weighs nothing: exp(-inf - 0), not exp(-inf - -inf).
    base = total.masked_fill(total == -torch.inf, 0.0)
    sum_ = lse.new_zeros(out.shape)
    for partial in partials:
        assert partial.lse is not None
        weight = (partial.lse - partial.of_lse(base)).exp().transpose(1, 2)[..., None]
        partial.of(sum_).add_(partial.x * weight)
    out.copy_(sum_)
    lse.copy_(total)


def add(out: Tensor, partials: Sequence[Partial]) -> None:
    """Sum the partials that cover a query into `out`: wide, rounded once. One kernel on a GPU.

    Args:
        out: [B, S, H, D], any float dtype, written; it may be the whole of a partial.
        partials: their lse is not read.
    """
    if out.device.type == "cuda" and out.dtype != torch.float64 and HAS_TRITON:
        from lhcp.ring.merge.merge_kernel import add_fused

        add_fused(out, partials)
        return
    sum_ = torch.zeros_like(out, dtype=wide(out.dtype))
    for partial in partials:
        partial.of(sum_).add_(partial.x)
    out.copy_(sum_)
