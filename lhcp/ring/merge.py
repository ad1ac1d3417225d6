"""The online merge of partial attentions: outputs weighted by their share of the softmax."""

import torch
from torch import Tensor


def merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merge a block's attention into (out, lse), in place.

    With l = logaddexp(lse, block_lse): out = exp(lse - l) out + exp(block_lse - l) block_out.

    Args:
        out: [B, S, H, D], float32 (float64 for float64 inputs). lse: [B, H, S], the same dtype.
        block_out: [B, S, H, D], any float dtype. block_lse: [B, H, S], the dtype of `lse`.
    """
    total = torch.logaddexp(lse, block_lse)
    keep, take = ((part - total).exp().transpose(1, 2)[..., None] for part in (lse, block_lse))
    out.mul_(keep).addcmul_(block_out.to(out.dtype), take)
    lse.copy_(total)
