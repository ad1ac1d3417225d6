"""Gather the selected entries of q, k and v into the sub-sequence, and its gradient.

The gradient goes through the means as well: entry (l, i) gives each token of its window
1 / p**l of its row. The inverse map makes it a bounded sum of reads owned by the token.
"""

import torch
from torch import Tensor

from lhcp.lighthouse.documents import mean_of, own_tokens
from lhcp.lighthouse.geometry import Geometry
from lhcp.precision import wide


def heads_of(index: Tensor, num_heads: int) -> Tensor:
    """Spread an index [B, Hk, X] over the query heads of each group: [B, X, heads, 1] int64."""
    return index.long().repeat_interleave(num_heads // index.shape[1], 1).transpose(1, 2)[..., None]


def gather_one(x: Tensor, pooled: Tensor, entries: Tensor) -> Tensor:
    """Read the entries' rows.

    Args:
        x: [B, n, heads, D], level 0. pooled: [B, pooled_size, heads, D], the other levels.
        entries: [B, Hk, S] pyramid ids.

    Returns:
        [B, S, heads, D].
    """
    index = heads_of(entries, x.shape[2]).expand(-1, -1, -1, x.shape[3])
    return torch.cat([x, pooled], 1).gather(1, index)


def rows_at(sub: Tensor, row_of_entry: Tensor) -> Tensor:
    """Read rows of the sub-sequence [B, S, heads, D] at row_of_entry [B, Hk, X]; zero where -1.

    Returns:
        [B, X, heads, D].
    """
    index = heads_of(row_of_entry, sub.shape[2])
    rows = sub.gather(1, index.clamp(min=0).expand(-1, -1, -1, sub.shape[3]))
    return rows.masked_fill(index < 0, 0)


def gather_backward_one(
    dsub: Tensor, row_of_entry: Tensor, geom: Geometry, positions: Tensor | None = None
) -> Tensor:
    """Return the gradient of one gathered tensor's source: [B, S, heads, D] -> [B, n, heads, D].

    With positions [B, n] inside documents, an entry's tokens are those of its document alone.
    """
    sum_dtype = wide(dsub.dtype)
    total = rows_at(dsub, row_of_entry[..., : geom.num_tokens]).to(sum_dtype)
    for level in range(1, geom.num_levels):
        columns = slice(geom.offset(level), geom.offset(level + 1))
        window = geom.window(level)
        rows = rows_at(dsub, row_of_entry[..., columns]).to(sum_dtype)
        rows = mean_of(rows, level, geom, positions).repeat_interleave(window, dim=1)
        if positions is not None:
            rows = rows.where(own_tokens(positions, level, geom)[..., None, None], 0)
        total = total + rows
    return total.to(dsub.dtype)
