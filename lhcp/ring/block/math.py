"""Block attention in plain torch: any device, any float dtype, quadratic memory."""

import torch
from torch import Tensor

from lhcp.precision import wide
from lhcp.ring.block.base import BackwardInputs, Block, Grads
from lhcp.ring.kv import KV
from lhcp.ring.shape import Mask


def _wide(x: Tensor) -> Tensor:
    return x.to(wide(x.dtype))


def _logits(q: Tensor, k: Tensor, mask: Mask, scale: float) -> Tensor:
    """Return wide logits [B, Hk, G, Sq, Sk] of q [B, Sq, H, D] and k [B, Sk, Hk, D]."""
    grouped = _wide(q).unflatten(2, (k.shape[2], -1))
    logits = torch.einsum("bqhgd,bkhd->bhgqk", grouped, _wide(k)) * scale
    if mask.causal:
        future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(future, -torch.inf)
    return logits


def forward(q: Tensor, kv: KV, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    """Attend as `Block.forward`."""
    logits = _logits(q, kv.k, mask, scale)
    lse = logits.logsumexp(-1)
    out = torch.einsum("bhgqk,bkhd->bqhgd", (logits - lse[..., None]).exp(), _wide(kv.v))
    return out.flatten(2, 3).to(q.dtype), lse.flatten(1, 2)


def backward(inputs: BackwardInputs, mask: Mask, scale: float) -> Grads:
    """Compute gradients as `Block.backward`."""
    dout, q, (k, v), out, lse = inputs
    heads = (k.shape[2], q.shape[2] // k.shape[2])
    weights = (_logits(q, k, mask, scale) - lse.unflatten(1, heads)[..., None]).exp()
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
    preference=100,
)
