"""RoPE after the gather: entries of raw q and k, each turned at the last token that it covers.

A variant, for comparison: the method as published pools q and k that are turned already.
"""

import torch
from torch import Tensor

from lhcp.lighthouse.geometry import Geometry


def turn(x: Tensor, rope: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + D/2]) of x [B, n, heads, D]; keeps the dtype.

    Args:
        x: raw q or k.
        rope: [..., n, 2, D/2] or [..., n, heads, 2, D/2]: cosines and sines of the angles.
    """
    if rope.ndim < x.ndim + 1:
        rope = rope[..., None, :, :]
    cos, sin = rope.unbind(-2)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def of_entries(rope: Tensor, entries: Tensor, geom: Geometry) -> Tensor:
    """Read what the entries' last tokens turn by.

    Args:
        rope: [n, 2, D/2] or [B, n, 2, D/2] of this rank's tokens.
        entries: [B, Hk, S] pyramid ids.

    Returns:
        [B, S, Hk, 2, D/2].
    """
    n = geom.num_tokens
    windows = (geom.window(level) for level in range(geom.num_levels))
    last = torch.cat([torch.arange(w - 1, n, w, device=entries.device) for w in windows])
    tokens = last[entries.long()].transpose(1, 2)
    if rope.ndim == 3:
        return rope[tokens]
    return rope[torch.arange(rope.shape[0], device=rope.device)[:, None, None], tokens]


def turn_entries(x: Tensor, rope: Tensor) -> Tensor:
    """Turn gathered x [B, S, heads, D] by `of_entries`, query heads with their group."""
    return turn(x, rope.repeat_interleave(x.shape[2] // rope.shape[2], 2))
