"""Mean pooling of q, k and v into levels 1 to L-1. No gradient here: `gather` owns it."""

import torch
from torch import Tensor

from lhcp.lighthouse.geometry import Geometry
from lhcp.precision import wide


def pool(x: Tensor, geom: Geometry) -> Tensor:
    """Return the mean of `x` over the windows of levels 1 to L-1.

    A level is summed from the unrounded sums of the level below, in the order of the entries, then
    divided and rounded once, so a mean does not depend on how the sequence is sharded.

    Args:
        x: [B, n, heads, D], this rank's tokens.

    Returns:
        [B, pooled_size, heads, D] in the dtype of `x`, level 1 first.
    """
    sums = x.to(wide(x.dtype))
    levels = []
    for level in range(1, geom.num_levels):
        children = sums.unflatten(1, (-1, geom.pool_factor)).unbind(2)
        sums = children[0]
        for child in children[1:]:
            sums = sums + child
        levels.append((sums / geom.window(level)).to(x.dtype))
    return torch.cat(levels, 1)
