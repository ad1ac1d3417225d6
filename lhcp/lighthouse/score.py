"""Parameter-free scores of the entries of levels 1 to L-1, by one table of scorers. No gradient.

"norm" takes squared norms of q and k themselves, "dilated" those of the outputs of a local dilated
attention.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lhcp.config import LighthouseConfig
from lhcp.lighthouse.geometry import Geometry
from lhcp.lighthouse.kernel_set import QKV
from lhcp.lighthouse.norms import level_scores, token_scores
from lhcp.lighthouse.operators import score_tensors
from lhcp.operators import pack_integers
from lhcp.precision import without_autocast

_FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

# cuDNN's has no use for a mask that is not its own.
_MASKED = _FASTEST_FIRST[1:]

_MASK_ELEMENTS = 2**26
"""Pairs of tokens whose mask is held at once: 64 MiB."""


@dataclass(frozen=True)
class ScoreInputs:
    """What a scorer reads, beside the tensors."""

    geom: Geometry
    config: LighthouseConfig
    kernels: str
    """One of `lhcp.lighthouse.kernel_sets.KERNELS`."""
    scale: float
    """Factor of the logits of a scorer that attends."""
    positions: Tensor | None = None
    """[B, n] of the tokens inside their documents; None: no documents."""


@dataclass(frozen=True)
class Scorer:
    """One way to rank entries."""

    score: Callable[[QKV, ScoreInputs], tuple[Tensor, Tensor]]
    """(what to score on, inputs) -> (sq, sk) of levels 1 to L-1, each [B, Hk, pooled_size]."""
    needs_values: bool
    """Whether it reads v."""
    comes_with_pooling: bool
    """Whether pooling q and k computes this very score on the way: what `pool_and_score` knows, the
    norm alone."""


def _norm(qkv: QKV, inputs: ScoreInputs) -> tuple[Tensor, Tensor]:
    sizes = pack_integers(inputs.geom)
    sq, sk = score_tensors(qkv.q, qkv.k, sizes, inputs.kernels, inputs.positions)
    return sq, sk


def _dilated(qkv: QKV, inputs: ScoreInputs) -> tuple[Tensor, Tensor]:
    sq, sk = dilated_scores(qkv, inputs)
    sq, sk = (level_scores(x, inputs.geom, inputs.positions) for x in (sq, sk))
    return sq, sk


@without_autocast
def dilated_outputs(qkv: QKV, inputs: ScoreInputs) -> tuple[Tensor, Tensor]:
    """Return the outputs of the dilated scorer's two attentions, as q, k, v and as k, q, v.

    Within a block of `scorer_window` tokens (or a stratum, if shorter), the tokens with the same
    index modulo `dilation` attend causally among themselves. A token's residue goes into the head
    axis, so that a stock kernel takes the tensors as they lie in memory. Blocks never span a
    stratum, so nothing here depends on how the sequence is sharded. With documents, a token attends
    inside its own.

    Args:
        qkv: q [B, n, H, E], k [B, n, Hk, E], v [B, n, Hk, D].

    Returns:
        two tensors [B, n, H, D].
    """
    (q, k, v), scale = qkv, inputs.scale
    window = min(inputs.config.scorer_window, inputs.geom.stratum_size)
    dilation, heads = inputs.config.dilation, q.shape[2]

    def by_residue(x: Tensor) -> Tensor:
        """View [B, n, heads, E] as [B blocks, dilation heads, window / dilation, E]."""
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
    if inputs.positions is not None:
        as_query = _inside_documents(QKV(q, repeated_k, repeated_v), inputs, window)
        return as_query, _inside_documents(QKV(repeated_k, q, repeated_v), inputs, window)
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


def _inside_documents(qkv: QKV, inputs: ScoreInputs, window: int) -> Tensor:
    """Attend as `dilated_outputs`, [B, n, H, *] each, by stock kernels that take a mask.

    A residue is a row of the batch here, since heads share a mask; so many rows at once as a mask
    of some size allows.
    """
    dilation = inputs.config.dilation
    rows = window // dilation

    def by_residue(x: Tensor) -> Tensor:
        """Turn [B, n, ...] into [B blocks dilation, rows, ...]."""
        return x.unflatten(1, (-1, rows, dilation)).transpose(2, 3).flatten(0, 2)

    assert inputs.positions is not None
    row = torch.arange(rows, device=qkv.q.device)
    before = dilation * (row[:, None] - row)
    reach = by_residue(inputs.positions)[:, None, :, None]
    q, k, v = (by_residue(x).transpose(1, 2) for x in qkv)
    parts, attend = [], F.scaled_dot_product_attention
    with sdpa_kernel(_MASKED, set_priority=True):
        size = max(1, _MASK_ELEMENTS // rows**2)
        for start in range(0, q.shape[0], size):
            at = slice(start, start + size)
            mask = (before >= 0) & (before <= reach[at])
            parts.append(attend(q[at], k[at], v[at], attn_mask=mask, scale=inputs.scale))
    out = torch.cat(parts).transpose(1, 2)
    blocks = out.unflatten(0, (qkv.q.shape[0], -1, dilation)).transpose(2, 3)
    return blocks.flatten(1, 3)


def dilated_scores(qkv: QKV, inputs: ScoreInputs) -> tuple[Tensor, Tensor]:
    """Return level-0 scores (sq, sk) of the dilated scorer, each [B, Hk, n]."""
    as_query, as_key = dilated_outputs(qkv, inputs)
    num_kv_heads = qkv.v.shape[2]
    return token_scores(as_query, num_kv_heads), token_scores(as_key, num_kv_heads)


SCORERS = {
    "norm": Scorer(_norm, needs_values=False, comes_with_pooling=True),
    "dilated": Scorer(_dilated, needs_values=True, comes_with_pooling=False),
}
"""By the names of `lhcp.config.SCORER_NAMES`."""
