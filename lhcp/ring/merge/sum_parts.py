"""The sum of gradient parts at their owner: wide, in the order of the ranks, rounded once."""

import torch
from torch import Tensor

from lhcp.operators import HAS_TRITON
from lhcp.precision import wide
from lhcp.ring.kv import KV


def sum_parts(parts: Tensor, first: int, own: KV | None, out: KV, chunk: int) -> None:
    """Sum the parts of dk and dv of this rank's chunks into `out`. One kernel on a GPU.

    Args:
        parts: [2, sources, B, tokens, heads, D], of the last tokens of a chunk, or all: `first`
            parts of the first chunk, then those of the second.
        own: dk and dv that did not travel, [B, chunks * tokens, heads, D] each, or None.
        out: dk and dv of as many tokens, any float dtype, written where parts are of; it may be
            `own`. In `out` heads and D lie together.
        chunk: tokens of a chunk.
    """
    if parts.device.type == "cuda" and parts.dtype != torch.float64 and HAS_TRITON:
        from lhcp.ring.merge.sum_kernel import sum_fused

        sum_fused(parts, first, own, out, chunk)
        return
    tokens = parts.shape[3]
    for kind in range(2):
        for slot, rows in enumerate((parts[kind, :first], parts[kind, first:])):
            at = slice((slot + 1) * chunk - tokens, (slot + 1) * chunk)
            if at.start >= out[kind].shape[1]:
                break
            total = rows.sum(0, dtype=wide(parts.dtype))
            if own is not None:
                total += own[kind][:, at]
            out[kind][:, at] = total
