"""Cross-entropy by chunks of tokens, with its gradients made on the way: autograd's functions."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lhcp.differentiation import once_differentiable
from lhcp.precision import wide, without_autocast


def _loss_and_grad(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return the summed loss of wide logits [t, V] and its gradient, which takes their memory."""
    valid = labels != ignore_index
    chosen = labels.where(valid, 0)[:, None]
    lse = logits.logsumexp(-1)
    losses = (lse - logits.gather(1, chosen)[:, 0]) * valid
    grad = logits.sub_(lse[:, None]).exp_()
    grad.scatter_add_(1, chosen, grad.new_full((), -1.0).expand(chosen.shape))
    # Not a product: what is ignored may hold a NaN, and says nothing all the same.
    return losses.where(valid, 0.0).sum(), grad.masked_fill_(~valid[:, None], 0.0)


class LogitsCrossEntropy(torch.autograd.Function):
    """(logits [n, V], labels [n], ignore_index, chunk) -> the summed loss, wide."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int, chunk: int) -> Tensor:
        """Sum the losses; the logits are kept, and read again in the backward."""
        ctx.save_for_backward(logits, labels)
        ctx.ignore_index, ctx.chunk = ignore_index, chunk
        dtype = wide(logits.dtype)
        total = logits.new_zeros((), dtype=dtype)
        for rows, targets in zip(
            torch.split(logits, chunk), torch.split(labels, chunk), strict=True
        ):
            total += F.cross_entropy(
                rows.to(dtype), targets, ignore_index=ignore_index, reduction="sum"
            )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the gradient of the logits, in their dtype."""
        logits, labels = ctx.saved_tensors
        dlogits = torch.empty_like(logits)
        for start in range(0, logits.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            rows = logits[part].to(wide(logits.dtype), copy=True)
            _, grad = _loss_and_grad(rows, labels[part], ctx.ignore_index)
            dlogits[part] = grad.mul_(grads[0])
        return dlogits, None, None, None


class LinearCrossEntropy(torch.autograd.Function):
    """(hidden [n, dim], weight [V, dim], bias [V], labels [n], ...) -> the summed loss, wide."""

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        ignore_index: int,
        chunk: int,
    ) -> Tensor:
        """Sum the losses and keep the gradients in place of the logits."""
        dtype = wide(hidden.dtype)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dhidden = torch.empty_like(hidden) if needs_hidden else None
        # Wide: as many sums as there are chunks would each be rounded.
        dweight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
        dbias = torch.zeros_like(bias, dtype=dtype) if bias is not None and needs_bias else None
        total = hidden.new_zeros((), dtype=dtype)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = F.linear(hidden[part], weight, bias).to(dtype)
            loss, grad = _loss_and_grad(logits, labels[part], ignore_index)
            total += loss
            dlogits = grad.to(hidden.dtype)
            if dhidden is not None:
                torch.mm(dlogits, weight, out=dhidden[part])
            if dweight is not None:
                dweight += dlogits.T @ hidden[part]
            if dbias is not None:
                dbias += grad.sum(0)
        # One of what they depend on, so that a second derivative is refused, not lost.
        ctx.save_for_backward(dhidden, dweight, dbias, weight if needs_weight else hidden)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the gradients that the forward made, times that of the loss."""
        *made, like = ctx.saved_tensors
        # Rounded on the way out: a wide product of weight's gradient would be held as well.
        dhidden, dweight, dbias = (
            None if x is None else torch.mul(x, grads[0], out=torch.empty_like(x, dtype=like.dtype))
            for x in made
        )
        return dhidden, dweight, dbias, None, None, None
