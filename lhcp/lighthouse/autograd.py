"""The autograd of the gather; pooling, scoring and selection have no gradient of their own."""

from typing import Any

import torch
from torch import Tensor

from lhcp.differentiation import once_differentiable
from lhcp.lighthouse.operators import gather_backward, gather_subsequence


class GatherSubsequence(torch.autograd.Function):
    """Gathers q, k and v; the gradient goes through the pooled means straight to the tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pooled_q: Tensor,
        pooled_k: Tensor,
        pooled_v: Tensor,
        entries: Tensor,
        row_of_entry: Tensor,
        geom: list[int],
        kernels: str,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Read the entries' rows. `positions`: inside documents, over which means were made."""
        ctx.save_for_backward(row_of_entry, positions)
        ctx.geom, ctx.kernels = geom, kernels
        means = [pooled_q, pooled_k, pooled_v]
        qs, ks, vs = gather_subsequence([q, k, v], means, entries, geom, kernels)
        return qs, ks, vs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Sum, for each token, the rows of its entries."""
        dq, dk, dv = (x.contiguous() for x in grads)
        row_of_entry, positions = ctx.saved_tensors
        tokens = gather_backward(dq, dk, dv, row_of_entry, ctx.geom, ctx.kernels, positions)
        return (*tokens, *(None,) * 8)
