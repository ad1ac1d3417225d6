"""Block attention in plain torch: any device, any float dtype, quadratic memory."""

import torch
from torch import Tensor

from lhcp.ring.block.base import Block


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _logits(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """Wide logits [B, Hk, G, Sq, Sk] of q [B, Sq, H, D] and k [B, Sk, Hk, D]."""
    grouped = _wide(q).unflatten(2, (k.shape[2], -1))
    logits = torch.einsum("bqhgd,bkhd->bhgqk", grouped, _wide(k)) * scale
    if causal:
        future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(future, -torch.inf)
    return logits


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    logits = _logits(q, k, causal, scale)
    lse = logits.logsumexp(-1)
    out = torch.einsum("bhgqk,bkhd->bqhgd", (logits - lse[..., None]).exp(), _wide(v))
    return out.flatten(2, 3).to(q.dtype), lse.flatten(1, 2)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    heads = (k.shape[2], q.shape[2] // k.shape[2])
    weights = (_logits(q, k, causal, scale) - lse.unflatten(1, heads)[..., None]).exp()
    grad = _wide(dout).unflatten(2, heads)
    delta = (_wide(dout) * _wide(out)).sum(-1).unflatten(2, heads).permute(0, 2, 3, 1)
    dweights = torch.einsum("bqhgd,bkhd->bhgqk", grad, _wide(v))
    dlogits = weights * (dweights - delta[..., None]) * scale
    dq = torch.einsum("bhgqk,bkhd->bqhgd", dlogits, _wide(k)).flatten(2, 3)
    dk = torch.einsum("bhgqk,bqhgd->bkhd", dlogits, _wide(q).unflatten(2, heads))
    dv = torch.einsum("bhgqk,bqhgd->bkhd", weights, grad)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


MATH = Block(
    name="math",
    forward=forward,
    backward=backward,
    devices=("cpu", "cuda"),
    dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
)
