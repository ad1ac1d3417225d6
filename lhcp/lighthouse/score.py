"""Parameter-free scores of the entries of levels 1 to L-1: squared norms, of q and k themselves
("norm") or of the outputs of a local dilated attention ("dilated"). No gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lhcp.config import LighthouseConfig
from lhcp.geometry import Geometry
from lhcp.lighthouse.pool import accumulate_dtype


def squared_norm(x: Tensor) -> Tensor:
    """Squared l2 norm over the last axis: [..., E] -> [...], wide, NaN as +inf.

    Halves are added pairwise, element by element. A library's sum may order its additions by shape,
    strides or threads; this one always adds a row in the same order, so that a token's score has
    the same bits on any number of ranks.
    """
    terms = x.to(accumulate_dtype(x.dtype)).square()
    while (size := terms.shape[-1]) > 1:
        half = size // 2
        paired = terms[..., :half] + terms[..., half : 2 * half]
        terms = torch.cat([paired, terms[..., 2 * half :]], -1) if size % 2 else paired
    return terms[..., 0].nan_to_num(nan=torch.inf, posinf=torch.inf)


def token_scores(x: Tensor, num_kv_heads: int) -> Tensor:
    """Squared norms of [B, n, heads, E], the largest of each kv head's group: [B, Hk, n]."""
    return squared_norm(x).unflatten(2, (num_kv_heads, -1)).amax(3).transpose(1, 2)


def level_scores(scores: Tensor, geom: Geometry) -> Tensor:
    """Maximum of level-0 scores [B, Hk, n] over the windows of levels 1 to L-1.

    Returns:
        [B, Hk, pooled_size], level 1 first.
    """
    levels = []
    for _ in range(1, geom.num_levels):
        scores = scores.unflatten(2, (-1, geom.pool_factor)).amax(3)
        levels.append(scores)
    return torch.cat(levels, 2)


def dilated_outputs(
    q: Tensor, k: Tensor, v: Tensor, geom: Geometry, config: LighthouseConfig, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs of the dilated scorer's two attentions, as q, k, v and as k, q, v.

    Within a block of `scorer_window` tokens (or a stratum, if shorter), the tokens with the same
    index modulo `dilation` attend causally among themselves, through a stock kernel on a strided
    view. Blocks never span a stratum, so nothing here depends on how the sequence is sharded.

    Args:
        q: [B, n, H, E]. k: [B, n, Hk, E]. v: [B, n, Hk, D].

    Returns:
        two tensors [B, n / (window / dilation * dilation), ...] flattened to [B * blocks,
        H, window / dilation, D]: only their norms are used, in the order that `_unblock` undoes.
    """
    window = min(config.scorer_window, geom.stratum_size)
    groups = q.shape[2] // k.shape[2]

    def block(x: Tensor, repeats: int) -> Tensor:
        split = x.unflatten(1, (-1, window // config.dilation, config.dilation))
        rows = split.permute(0, 1, 3, 4, 2, 5).flatten(0, 2)
        return rows.repeat_interleave(repeats, dim=1) if repeats > 1 else rows

    qb, kb, vb = block(q, 1), block(k, groups), block(v, groups)
    attend = F.scaled_dot_product_attention
    as_query = attend(qb, kb, vb, is_causal=True, scale=scale)
    as_key = attend(kb, qb, vb, is_causal=True, scale=scale)
    return as_query, as_key


def dilated_scores(
    q: Tensor, k: Tensor, v: Tensor, geom: Geometry, config: LighthouseConfig, scale: float
) -> tuple[Tensor, Tensor]:
    """Level-0 scores (sq, sk) of the dilated scorer, each [B, Hk, n]."""
    batch, num_kv_heads = q.shape[0], v.shape[2]

    def unblock(out: Tensor) -> Tensor:
        scores = squared_norm(out).unflatten(1, (num_kv_heads, -1)).amax(2)
        scores = scores.unflatten(0, (batch, -1, config.dilation))
        return scores.permute(0, 3, 1, 4, 2).flatten(2)

    as_query, as_key = dilated_outputs(q, k, v, geom, config, scale)
    return unblock(as_query), unblock(as_key)
