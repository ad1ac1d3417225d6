"""The sum of gradient parts at their owner: wide, in the order of the ranks, rounded once."""

import importlib.util

import torch
from torch import Tensor

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def sum_parts(
    parts: Tensor, first: int, own: tuple[Tensor, Tensor] | None, out: tuple[Tensor, Tensor]
) -> None:
    """Sum the parts of dk and dv of this rank's chunks into `out`. One kernel on a GPU.

    Args:
        parts: [2, givers, B, tokens of a chunk, heads, D]: `first` parts of the first chunk, then
            those of the second.
        own: dk and dv that did not travel, [B, chunks * tokens, heads, D] each, or None.
        out: dk and dv of as many tokens, any float dtype, written. In `own` and `out` heads and D
            lie together.
    """
    if parts.device.type == "cuda" and parts.dtype != torch.float64 and _HAS_TRITON:
        from lhcp.ring.merge.sum_kernel import sum_fused

        sum_fused(parts, first, own, out)
        return
    wide = torch.float64 if parts.dtype == torch.float64 else torch.float32
    tokens = parts.shape[3]
    for kind in range(2):
        for slot, rows in enumerate((parts[kind, :first], parts[kind, first:])):
            at = slice(slot * tokens, (slot + 1) * tokens)
            if at.start >= out[kind].shape[1]:
                break
            total = rows.sum(0, dtype=wide)
            if own is not None:
                total += own[kind][:, at]
            out[kind][:, at] = total
