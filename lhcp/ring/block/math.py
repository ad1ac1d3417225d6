"""Block attention in plain torch: any device, any float dtype, quadratic memory."""

import torch
from torch import Tensor

from lhcp.precision import wide
from lhcp.ring.block.base import BackwardInputs, Block, Bounds, Grads, PackedCalls
from lhcp.ring.kv import KV
from lhcp.ring.shape import Mask


def _wide(x: Tensor) -> Tensor:
    return x.to(wide(x.dtype))


def _hidden(q: Tensor, k: Tensor, mask: Mask, bounds: Bounds | None) -> Tensor | None:
    """Return which keys a query may not see: [Sq, Sk], or [B, 1 or Hk, 1, Sq, Sk]; None: none."""
    hidden = None
    if mask.causal:
        hidden = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).triu(1)
    if bounds is None:
        return hidden
    heads = k.shape[2] if bounds.per_head else 1

    def runs(of: Tensor, x: Tensor) -> Tensor:
        """Return the run that each row is in, [B, heads, S]."""
        rows = torch.arange(x.shape[0] * heads * x.shape[1], dtype=torch.int32, device=x.device)
        return torch.searchsorted(of, rows, right=True).view(x.shape[0], heads, 1, -1)

    others = runs(bounds.q, q)[..., :, None] != runs(bounds.kv, k)[..., None, :]
    return others if hidden is None else others | hidden


def _logits(q: Tensor, k: Tensor, hidden: Tensor | None, scale: float) -> Tensor:
    """Return wide logits [B, Hk, G, Sq, Sk] of q [B, Sq, H, D] and k [B, Sk, Hk, D]."""
    grouped = _wide(q).unflatten(2, (k.shape[2], -1))
    logits = torch.einsum("bqhgd,bkhd->bhgqk", grouped, _wide(k)) * scale
    return logits if hidden is None else logits.masked_fill(hidden, -torch.inf)


def _attend(q: Tensor, kv: KV, hidden: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    logits = _logits(q, kv.k, hidden, scale)
    lse = logits.logsumexp(-1)
    # A query that sees no key weighs nothing: exp(-inf - 0), not exp(-inf - -inf).
    base = lse.masked_fill(lse == -torch.inf, 0.0)
    out = torch.einsum("bhgqk,bkhd->bqhgd", (logits - base[..., None]).exp(), _wide(kv.v))
    return out.flatten(2, 3).to(q.dtype), lse.flatten(1, 2)


def _gradients(inputs: BackwardInputs, hidden: Tensor | None, scale: float) -> Grads:
    dout, q, (k, v), out, lse = inputs
    heads = (k.shape[2], q.shape[2] // k.shape[2])
    weights = (_logits(q, k, hidden, scale) - lse.unflatten(1, heads)[..., None]).exp()
    grad = _wide(dout).unflatten(2, heads)
    delta = (_wide(dout) * _wide(out)).sum(-1).unflatten(2, heads).permute(0, 2, 3, 1)
    dweights = torch.einsum("bqhgd,bkhd->bhgqk", grad, _wide(v))
    dlogits = weights * (dweights - delta[..., None]) * scale
    dq = torch.einsum("bhgqk,bkhd->bqhgd", dlogits, _wide(k)).flatten(2, 3)
    dk = torch.einsum("bhgqk,bqhgd->bkhd", dlogits, _wide(q).unflatten(2, heads))
    dv = torch.einsum("bhgqk,bqhgd->bkhd", weights, grad)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def forward(q: Tensor, kv: KV, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    """Attend as `Block.forward`."""
    return _attend(q, kv, _hidden(q, kv.k, mask, None), scale)


def backward(inputs: BackwardInputs, mask: Mask, scale: float) -> Grads:
    """Compute gradients as `Block.backward`."""
    return _gradients(inputs, _hidden(inputs.q, inputs.kv.k, mask, None), scale)


def _packed_forward(
    q: Tensor, kv: KV, mask: Mask, bounds: Bounds, scale: float
) -> tuple[Tensor, Tensor]:
    return _attend(q, kv, _hidden(q, kv.k, mask, bounds), scale)


def _packed_backward(inputs: BackwardInputs, mask: Mask, bounds: Bounds, scale: float) -> Grads:
    return _gradients(inputs, _hidden(inputs.q, inputs.kv.k, mask, bounds), scale)


MATH = Block(
    name="math",
    forward=forward,
    backward=backward,
    devices=("cpu", "cuda"),
    dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    preference=100,
    packed=PackedCalls(_packed_forward, _packed_backward),
)
