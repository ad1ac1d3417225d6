"""The merge of partial attentions: outputs weighted by their share of the softmax."""

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def merge(out: Tensor, lse: Tensor, parts: Sequence[Tensor], part_lses: Sequence[Tensor]) -> None:
    """Merge the attentions of the same queries to parts of the keys into (out, lse).

    With l = logsumexp of their lse_i: out = sum of exp(lse_i - l) out_i, summed wide and rounded
    once (arXiv 2112.05682). One kernel on a GPU: each part is read once.

    Args:
        out: [B, S, H, D], any float dtype, written; it may be one of the parts.
        lse: [B, H, S], float32 (float64 for float64 inputs), written.
        parts: [B, S, H, D] each, any float dtype. part_lses: [B, H, S] each, the dtype of `lse`.
    """
    if out.device.type == "cuda" and lse.dtype == torch.float32 and _HAS_TRITON:
        from lhcp.ring.merge_kernel import merge_fused

        merge_fused(out, lse, parts, part_lses)
        return
    together = torch.stack(tuple(part_lses))
    total = together.logsumexp(0)
    weights = (together - total).exp().transpose(2, 3)[..., None]
    first, *others = zip(parts, weights, strict=True)
    wide = first[0] * first[1]
    for part, weight in others:
        wide += part * weight
    out.copy_(wide)
    lse.copy_(total)


def add(out: Tensor, parts: Sequence[Tensor]) -> None:
    """Sum parts into `out`: wide, rounded once. One kernel on a GPU: each part is read once.

    Args:
        out: [B, S, H, D], any float dtype, written; it may be one of the parts.
        parts: [B, S, H, D] each, any float dtype.
    """
    if out.device.type == "cuda" and out.dtype != torch.float64 and _HAS_TRITON:
        from lhcp.ring.merge_kernel import add_fused

        add_fused(out, parts)
        return
    wide = torch.float64 if out.dtype == torch.float64 else torch.float32
    total = parts[0].to(wide, copy=True)
    for part in parts[1:]:
        total += part
    out.copy_(total)
