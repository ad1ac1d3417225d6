"""Calls that documents cut, for kernels that take rows laid end to end with bounds ("varlen").

Where each kv head has runs of its own, heads are laid end to end too: a kernel then sees one kv
head and its queries' group.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lhcp.ring.block.base import BackwardInputs, Bounds, Grads, PackedCalls
from lhcp.ring.kv import KV
from lhcp.ring.shape import Mask


class Varlen(NamedTuple):
    """A kernel over rows laid end to end."""

    forward: Callable[[Tensor, KV, Mask, Bounds, float], tuple[Tensor, Tensor]]
    """q [rows, H, D]; kv [keys, Hk, D] -> out [rows, H, D]; lse [H, rows], and that of a query
    whose run has no keys -inf, its out 0."""
    backward: Callable[[BackwardInputs, Mask, Bounds, float], Grads]
    """inputs in the same form -> dq, dk, dv in it, zero where nothing attended."""


def packed_calls(kernel: Varlen) -> PackedCalls:
    """Return a block's functions that lay rows end to end for a kernel."""

    def forward(
        q: Tensor, kv: KV, mask: Mask, bounds: Bounds, scale: float
    ) -> tuple[Tensor, Tensor]:
        rows = _Rows(q, kv.k, bounds.per_head)
        out, lse = kernel.forward(rows.lay(q), kv.map(rows.lay), mask, bounds, scale)
        return rows.restore(out), rows.restore_lse(lse)

    def backward(inputs: BackwardInputs, mask: Mask, bounds: Bounds, scale: float) -> Grads:
        dout, q, kv, out, lse = inputs
        rows = _Rows(q, kv.k, bounds.per_head)
        laid = BackwardInputs(
            rows.lay(dout), rows.lay(q), kv.map(rows.lay), rows.lay(out), rows.lay_lse(lse)
        )
        dq, dk, dv = kernel.backward(laid, mask, bounds, scale)
        return rows.restore(dq), rows.restore(dk), rows.restore(dv)

    return PackedCalls(forward, backward)


def checked_lse(lse: Tensor | None, q: Tensor, source: str) -> Tensor:
    """Return a kernel's lse [H, rows].

    Raises:
        ImportError: the kernel returned something else.
    """
    wanted = (q.shape[1], q.shape[0])
    if lse is None or tuple(lse.shape) != wanted or lse.dtype != torch.float32:
        seen = None if lse is None else (tuple(lse.shape), lse.dtype)
        raise ImportError(f"{source} returned lse {seen}, expected float32 {wanted}")
    return lse


def without_keys(lse: Tensor | None, q: Tensor, source: str) -> Tensor:
    """Return a flash kernel's lse as `checked_lse`; -inf where it wrote inf for a query that met
    no key.
    """
    lse = checked_lse(lse, q, source)
    return lse.masked_fill_(lse == torch.inf, -torch.inf)


class _Rows:
    """How the rows of q [B, Sq, H, D] and k [B, Sk, Hk, D] are laid end to end, and back."""

    def __init__(self, q: Tensor, k: Tensor, per_head: bool) -> None:
        self._batch = q.shape[0]
        self._heads = k.shape[2] if per_head else 1

    def lay(self, x: Tensor) -> Tensor:
        """Turn [B, S, heads, D] into [rows, heads, D]; a view where it can be."""
        return x.unflatten(2, (self._heads, -1)).transpose(1, 2).flatten(0, 2)

    def restore(self, x: Tensor) -> Tensor:
        """View [rows, heads, D] as [B, S, heads, D]."""
        return x.unflatten(0, (self._batch, self._heads, -1)).transpose(1, 2).flatten(2, 3)

    def lay_lse(self, lse: Tensor) -> Tensor:
        """Turn [B, H, S] into [heads, rows], contiguous."""
        by_head = lse.unflatten(1, (self._heads, -1))
        return by_head.permute(2, 0, 1, 3).flatten(1).contiguous()

    def restore_lse(self, lse: Tensor) -> Tensor:
        """Turn [heads, rows] into [B, H, S]."""
        by_head = lse.unflatten(1, (self._batch, self._heads, -1))
        return by_head.permute(1, 2, 0, 3).flatten(1, 2)
