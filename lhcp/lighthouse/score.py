"""Parameter-free scores of the entries of levels 1 to L-1: squared norms, of q and k themselves
("norm") or of the outputs of a local dilated attention ("dilated"). No gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lhcp.config import LighthouseConfig
from lhcp.lighthouse.geometry import Geometry
from lhcp.lighthouse.pool import accumulate_dtype

_FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


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
    index modulo `dilation` attend causally among themselves. A token's residue goes into the head
    axis, so that a stock kernel takes the tensors as they lie in memory. Blocks never span a
    stratum, so nothing here depends on how the sequence is sharded.

    Args:
        q: [B, n, H, E]. k: [B, n, Hk, E]. v: [B, n, Hk, D].

    Returns:
        two tensors [B, n, H, D].
    """
    window = min(config.scorer_window, geom.stratum_size)
    dilation, heads = config.dilation, q.shape[2]

    def by_residue(x: Tensor) -> Tensor:
        """[B, n, heads, E] to [B blocks, dilation heads, window / dilation, E], a view."""
        blocks = x.unflatten(1, (-1, window // dilation, dilation)).flatten(0, 1)
        return blocks.flatten(2, 3).transpose(1, 2)

    def back(out: Tensor) -> Tensor:
        blocks = out.transpose(1, 2).unflatten(2, (dilation, heads)).flatten(1, 2)
        return blocks.unflatten(0, (q.shape[0], -1)).flatten(1, 2)

    # Each query head with its group's kv head: nothing to repeat while the queries are q.
    groups = heads // k.shape[2]
    repeated_k, repeated_v = (
        x.repeat_interleave(groups, dim=2) if groups > 1 else x for x in (k, v)
    )
    attend = F.scaled_dot_product_attention
    with sdpa_kernel(_FASTEST_FIRST, set_priority=True):
        as_query = attend(
            by_residue(q),
            by_residue(k),
            by_residue(v),
            is_causal=True,
            scale=scale,
            enable_gqa=groups > 1,
        )
        as_key = attend(
            by_residue(repeated_k),
            by_residue(q),
            by_residue(repeated_v),
            is_causal=True,
            scale=scale,
        )
    return back(as_query), back(as_key)


def dilated_scores(
    q: Tensor, k: Tensor, v: Tensor, geom: Geometry, config: LighthouseConfig, scale: float
) -> tuple[Tensor, Tensor]:
    """Level-0 scores (sq, sk) of the dilated scorer, each [B, Hk, n]."""
    as_query, as_key = dilated_outputs(q, k, v, geom, config, scale)
    return token_scores(as_query, v.shape[2]), token_scores(as_key, v.shape[2])
