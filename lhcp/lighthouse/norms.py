"""Squared norms of tokens, and their maximum over the windows of each level. No gradient."""

import torch
from torch import Tensor

from lhcp.lighthouse.documents import own_children
from lhcp.lighthouse.geometry import Geometry
from lhcp.precision import wide


def squared_norm(x: Tensor) -> Tensor:
    """Return the squared l2 norm over the last axis: [..., E] -> [...], wide, NaN as +inf.

    Halves are added pairwise, element by element. A library's sum may order its additions by shape,
    strides or threads; this one always adds a row in the same order, so that a token's score has
    the same bits on any number of ranks.
    """
    terms = x.to(wide(x.dtype)).square()
    while (size := terms.shape[-1]) > 1:
        half = size // 2
        paired = terms[..., :half] + terms[..., half : 2 * half]
        terms = torch.cat([paired, terms[..., 2 * half :]], -1) if size % 2 else paired
    return terms[..., 0].nan_to_num(nan=torch.inf, posinf=torch.inf)


def token_scores(x: Tensor, num_kv_heads: int) -> Tensor:
    """Return squared norms of [B, n, heads, E], the largest of each kv head's group: [B, Hk, n]."""
    return squared_norm(x).unflatten(2, (num_kv_heads, -1)).amax(3).transpose(1, 2)


def level_scores(scores: Tensor, geom: Geometry, positions: Tensor | None = None) -> Tensor:
    """Return the maximum of level-0 scores [B, Hk, n] over the windows of levels 1 to L-1.

    With positions [B, n] inside documents, over the tokens of the document of a window's last one.

    Returns:
        [B, Hk, pooled_size], level 1 first.
    """
    levels = []
    for level in range(1, geom.num_levels):
        children = scores.unflatten(2, (-1, geom.pool_factor))
        if positions is not None:
            others = ~own_children(positions, level, geom)[:, None]
            children = children.masked_fill(others, -torch.inf)
        scores = children.amax(3)
        levels.append(scores)
    return torch.cat(levels, 2)
