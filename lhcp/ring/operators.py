"""The ring as operators for torch.compile, and its autograd."""

from typing import Any

import torch
from torch import Tensor

from lhcp.comm.agreement import agree_on_sizes
from lhcp.differentiation import once_differentiable
from lhcp.operators import operator
from lhcp.precision import wide
from lhcp.ring.block.base import BackwardInputs
from lhcp.ring.documents import PackedRows
from lhcp.ring.kv import KV
from lhcp.ring.loop import ring_backward, ring_forward
from lhcp.ring.plan import RingPlan
from lhcp.timing import UNTIMED, Spans, goes_through_operators


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: list[Tensor],
    words: str,
    integers: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty((batch, heads, tokens), dtype=wide(q.dtype))


@operator("ring_forward", _fake_forward)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: list[Tensor],
    words: str,
    integers: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    plan = RingPlan.unpack((words, integers, scale))
    if plan.traced:
        agree_on_sizes(plan.ranks, plan.shape, plan.shape.in_words)
    return ring_forward(q, KV(k, v), plan, UNTIMED, _packed_rows(packed))


def _fake_backward(
    dout: Tensor,
    qkv: list[Tensor],
    saved: list[Tensor],
    words: str,
    integers: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in qkv)
    return dq, dk, dv


@operator("ring_backward", _fake_backward)
def _backward(
    dout: Tensor,
    qkv: list[Tensor],
    saved: list[Tensor],
    words: str,
    integers: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (q, k, v), (out, lse, *packed) = qkv, saved
    plan = RingPlan.unpack((words, integers, scale))
    inputs = BackwardInputs(dout, q, KV(k, v), out, lse)
    grads = ring_backward(inputs, plan, UNTIMED, _packed_rows(packed))
    dq, dk, dv = (x.contiguous() for x in grads)
    return dq, dk, dv


def _packed_rows(tensors: list[Tensor]) -> PackedRows | None:
    """Return the documents that came into an operator, as no tensors where there are none."""
    return PackedRows(*tensors) if tensors else None


class RingAttention(torch.autograd.Function):
    """Autograd of the ring: (out, lse) forward; lse carries no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: RingPlan,
        spans: Spans,
        numbers: Tensor | None,
        limits: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Attend as `ring_forward`; `numbers`, `limits`: of `PackedRows`, or None.

        Not as many tensors as there are: without a gradient torch.compile mixes those up.
        """
        packed = [] if numbers is None or limits is None else [numbers, limits]
        if goes_through_operators(spans):
            out, lse = _forward(q, k, v, packed, *plan.pack())
        else:
            out, lse = ring_forward(q, KV(k, v), plan, spans, _packed_rows(packed))
        ctx.save_for_backward(q, k, v, out, lse, *packed)
        ctx.mark_non_differentiable(lse)
        ctx.plan, ctx.spans = plan, spans
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Compute gradients as `ring_backward`."""
        q, k, v, *saved = ctx.saved_tensors
        if goes_through_operators(ctx.spans):
            dq, dk, dv = _backward(grads[0], [q, k, v], saved, *ctx.plan.pack())
        else:
            out, lse, *packed = saved
            inputs = BackwardInputs(grads[0], q, KV(k, v), out, lse)
            dq, dk, dv = ring_backward(inputs, ctx.plan, ctx.spans, _packed_rows(packed))
        return dq, dk, dv, None, None, None, None
