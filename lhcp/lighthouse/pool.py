"""Mean pooling of q, k and v into levels 1 to L-1. No gradient here: `gather` owns it."""

import torch
from torch import Tensor

from lhcp.lighthouse.documents import mean_of, own_children
from lhcp.lighthouse.geometry import Geometry
from lhcp.precision import wide


def pool(x: Tensor, geom: Geometry, positions: Tensor | None = None) -> Tensor:
    """Return the mean of `x` over the windows of levels 1 to L-1.

    A level is summed from the unrounded sums of the level below, in the order of the entries, then
    divided and rounded once, so a mean does not depend on how the sequence is sharded.

    Args:
        x: [B, n, heads, D], this rank's tokens.
        positions: [B, n] inside documents; a window's mean is then over those of its tokens that
            are in its last one's document.

    Returns:
        [B, pooled_size, heads, D] in the dtype of `x`, level 1 first.
    """
    sums = x.to(wide(x.dtype))
    levels = []
    for level in range(1, geom.num_levels):
        children = sums.unflatten(1, (-1, geom.pool_factor))
        if positions is not None:
            children = children.where(own_children(positions, level, geom)[..., None, None], 0)
        sums, *others = children.unbind(2)
        for child in others:
            sums = sums + child
        levels.append(mean_of(sums, level, geom, positions).to(x.dtype))
    return torch.cat(levels, 1)
