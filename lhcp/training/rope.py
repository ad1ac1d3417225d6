"""Rotary positions (RoPE): the factors of each token, and the turning of queries and keys."""

import torch
from torch import Tensor


def rope_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return the RoPE factors (arXiv 2104.09864) that `rotate` takes, fp32.

    Args:
        positions: Global positions of this rank's tokens, int64 [n]; or [B, n].
        head_dim: D.
        theta: Base of the frequencies.

    Returns:
        cos [..., n, 1, 1, D / 2]; sin [..., n, 1, 2, D / 2], negative for the first half of a head.
    """
    # At a million tokens an fp32 angle is wrong by 0.06 rad, so the angles are float64.
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64) / head_dim
    angles = (positions.to(torch.float64)[..., None] * theta**-exponent)[..., None, None, :]
    sin = angles.sin()
    return angles.cos().float(), torch.cat((-sin, sin), dim=-2).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + D/2]) of x [B, n, heads, D] by the angles; keeps the dtype."""
    halves = torch.unflatten(x, -1, (2, -1))
    # The other half by its index and not by a cat: compiled, that is one pass over x.
    return (halves * cos + halves.flip(-2) * sin).flatten(-2).to(x.dtype)
