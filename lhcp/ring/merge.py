"""The online merge of partial attentions: outputs weighted by their share of the softmax."""

import importlib.util

import torch
from torch import Tensor

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merge a block's attention into (out, lse), in place.

    With l = logaddexp(lse, block_lse): out = exp(lse - l) out + exp(block_lse - l) block_out, in
    the dtype of lse, rounded once to the dtype of out. One fused kernel on a GPU.

    Args:
        out: [B, S, H, D]; wide where more than one merge follows, else any float dtype.
        lse: [B, H, S], float32 (float64 for float64 inputs).
        block_out: [B, S, H, D], any float dtype. block_lse: [B, H, S], the dtype of `lse`.
    """
    if out.device.type == "cuda" and lse.dtype == torch.float32 and _HAS_TRITON:
        from lhcp.ring.merge_kernel import merge_fused

        merge_fused(out, lse, block_out, block_lse)
        return
    total = torch.logaddexp(lse, block_lse)
    keep, take = ((part - total).exp().transpose(1, 2)[..., None] for part in (lse, block_lse))
    out.copy_(out * keep + block_out * take)
    lse.copy_(total)
