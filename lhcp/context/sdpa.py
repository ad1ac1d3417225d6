"""What attention across ranks can do of torch's `scaled_dot_product_attention`."""

import torch
from torch import Tensor

from lhcp.checks import shape_of


def check_sdpa(
    qkv: tuple[Tensor, Tensor, Tensor],
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> None:
    """Check the arguments of torch's function against what attention across ranks can do.

    Raises:
        ValueError: a mask, dropout, attention that is not causal, heads that need enable_gqa, or
            tensors that are not [B, H, N / W, D]; the message says what to do.
    """
    if attn_mask is not None:
        raise ValueError(
            f"attn_mask is {shape_of(attn_mask)}: must be None; attention across ranks is causal: "
            "pass is_causal=True, and packed documents as cu_seqlens=; padding at the end of the "
            "sequence needs no mask"
        )
    if dropout_p:
        raise ValueError(f"dropout_p={dropout_p}: must be 0; use model.eval(), or 0 in its config")
    if not is_causal:
        raise ValueError(
            "is_causal=False: must be True; for attention to all tokens use lhcp.ring_attention("
            "..., causal=False), whose tensors are [B, N / W, H, D]"
        )
    query, key, value = qkv
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(f"{name} is {shape_of(x)}: must be [batch, heads, seqlen, head_dim]")
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"query is {shape_of(query)}, key {shape_of(key)}: must have as many tokens, along "
            "axis 2: [batch, heads, seqlen, head_dim]; decoding with a cache runs on one rank"
        )
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError(
            f"query has {query.shape[1]} heads, key {key.shape[1]}: pass enable_gqa=True; axes are "
            "[batch, heads, seqlen, head_dim]"
        )


def in_torchs_dtype(x: Tensor) -> Tensor:
    """Return x in the dtype that torch's function takes it in under the caller's autocast."""
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))
