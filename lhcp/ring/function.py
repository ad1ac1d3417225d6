"""`ring_attention`: the public function, its autograd, its operators for torch.compile."""

from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from lhcp.checks import check_qkv
from lhcp.comm.layout import LayoutName, make_layout
from lhcp.comm.mesh import Group, Ranks, as_ranks
from lhcp.cost.calibration import Calibration
from lhcp.cost.choice import fastest_rotation
from lhcp.integrations.ring_flash_attn import check_ring_flash_attn, ring_flash_attn
from lhcp.operators import joined, operator, parted
from lhcp.ring.block import choose_block
from lhcp.ring.loop import Plan, attend, attend_backward
from lhcp.ring.rotation import check_rotation
from lhcp.ring.rotation.alltoall import HeadsToTokens, TokensToHeads
from lhcp.ring.rotation.base import wide
from lhcp.timing import UNTIMED, Spans

# A plan as an operator's arguments: group names, layout, rotation, backend; causal; scale.
_PlanArguments = tuple[str, bool, float]


def _to_arguments(plan: Plan) -> _PlanArguments:
    words = [*plan.ranks.names, plan.layout.name, plan.rotation, plan.backend]
    return joined(words), plan.causal, plan.scale


def _from_arguments(words: str, causal: bool, scale: float) -> Plan:
    flat, outer, inner, layout, rotation, backend = parted(words)
    ranks = Ranks.from_names((flat, outer, inner))
    return Plan(ranks, make_layout(layout, ranks.world_size), rotation, backend, causal, scale)


def _fake_ring_forward(
    q: Tensor, k: Tensor, v: Tensor, words: str, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty((batch, heads, tokens), dtype=wide(q.dtype))


@operator("ring_forward", _fake_ring_forward)
def _ring_forward(
    q: Tensor, k: Tensor, v: Tensor, words: str, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    return attend(q, k, v, _from_arguments(words, causal, scale), UNTIMED)


def _fake_ring_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    words: str,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


@operator("ring_backward", _fake_ring_backward)
def _ring_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    words: str,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    plan = _from_arguments(words, causal, scale)
    dq, dk, dv = attend_backward(dout, q, k, v, out, lse, plan, UNTIMED)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


class RingAttention(torch.autograd.Function):
    """Autograd of `attend`: (out, lse) forward; lse carries no gradient."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, spans: Spans
    ) -> tuple[Tensor, Tensor]:
        if spans is UNTIMED or torch.compiler.is_compiling():
            out, lse = _ring_forward(q, k, v, *_to_arguments(plan))
        else:
            out, lse = attend(q, k, v, plan, spans)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mark_non_differentiable(lse)
        ctx.plan, ctx.spans = plan, spans
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        saved = (grads[0], q, k, v, out, lse)
        if ctx.spans is UNTIMED or torch.compiler.is_compiling():
            dq, dk, dv = _ring_backward(*saved, *_to_arguments(ctx.plan))
        else:
            dq, dk, dv = attend_backward(*saved, ctx.plan, ctx.spans)
        return dq, dk, dv, None, None


def attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, spans: Spans) -> tuple[Tensor, Tensor]:
    """Carry out a plan, differentiably: q [B, n, H, D], k, v [B, n, Hk, D] -> out, lse."""
    if plan.rotation == "ring_flash_attn" and plan.ranks.world_size > 1:
        return ring_flash_attn(q, k, v, plan.ranks.flat, plan.scale, plan.causal)
    if plan.rotation != "alltoall" or plan.ranks.world_size == 1:
        out, lse = RingAttention.apply(q, k, v, plan, spans)
        return out, lse
    ranks, layout = plan.ranks, plan.layout
    with spans.span("alltoall", "wait", 0, q.device):
        q, k, v = TokensToHeads.apply(q, k, v, ranks, layout)
    alone = replace(plan, ranks=Ranks(), layout=make_layout(layout.name, 1))
    out, lse = RingAttention.apply(q, k, v, alone, spans)
    with spans.span("alltoall", "wait", 1, q.device), torch.no_grad():
        lse_rows = HeadsToTokens.apply(lse.transpose(1, 2)[..., None], ranks, layout)
    with spans.span("alltoall", "wait", 2, q.device):
        out = HeadsToTokens.apply(out, ranks, layout)
    return out, lse_rows[..., 0].transpose(1, 2)


def make_plan(
    q: Tensor,
    k: Tensor,
    ranks: Ranks,
    layout: LayoutName,
    rotation: str | Calibration,
    backend: str,
    causal: bool,
    scale: float | None,
    tokens: int,
) -> Plan:
    """Resolve every "auto" and check every name; no communication.

    Args:
        tokens: of this rank that attention runs on: of q, or entries of the sub-sequence.

    Raises:
        ValueError, ImportError: see `ring_attention`.
    """
    cut = make_layout(layout, ranks.world_size)
    if isinstance(rotation, str) and rotation != "auto":
        name = rotation
    elif ranks.world_size == 1:
        name = "p2p"
    else:
        name = fastest_rotation(
            tokens * ranks.world_size,
            ranks.world_size,
            None if ranks.inner is None else ranks.inner.size(),
            (q.shape[2], k.shape[2]),
            q.shape[3],
            q.shape[0],
            q.element_size(),
            layout,
            causal,
            q.device.type,
            None if isinstance(rotation, str) else rotation.text,
        )
    check_rotation(name, ranks, k.shape[2])
    if name == "ring_flash_attn":
        check_ring_flash_attn(q.dtype, q.shape[3], q.device, cut, causal)
    return Plan(
        ranks,
        cut,
        name,
        choose_block(backend, q.dtype, q.shape[3], q.device).name,
        causal,
        q.shape[3] ** -0.5 if scale is None else scale,
    )


@overload
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group | Ranks = None,
    layout: LayoutName = "zigzag",
    rotation: str | Calibration = "auto",
    backend: str = "auto",
    causal: bool = True,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    timers: Spans = UNTIMED,
) -> Tensor: ...


@overload
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group | Ranks = None,
    layout: LayoutName = "zigzag",
    rotation: str | Calibration = "auto",
    backend: str = "auto",
    causal: bool = True,
    scale: float | None = None,
    return_lse: Literal[True],
    timers: Spans = UNTIMED,
) -> tuple[Tensor, Tensor]: ...


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group | Ranks = None,
    layout: LayoutName = "zigzag",
    rotation: str | Calibration = "auto",
    backend: str = "auto",
    causal: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
    timers: Spans = UNTIMED,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact dense attention over a sequence that is sharded over ranks (arXiv 2310.01889).

    Args:
        q: [B, N / W, H, D], this rank's queries in layout order.
        k, v: [B, N / W, Hk, D], the dtype of q; H a multiple of Hk. kv heads travel unrepeated.
        group: ProcessGroup, DeviceMesh of one axis (or two, outer across nodes), or None for one
            rank. Every rank must call with equal shapes and choices.
        layout: "zigzag" or "contiguous": how `shard` cut the sequence.
        rotation: "p2p", "allgather", "hierarchical" (a mesh of two axes), "alltoall" (kv heads
            divide over the ranks), "ring_flash_attn" (the package), or "auto": what the cost model
            predicts to be fastest, by a built-in table or by the `Calibration` given instead.
        backend: "cpu", "cudnn", "flash" (torch's operators), "flash_attn", "fa4" (packages),
            "math", or "auto".
        causal: mask keys after the query's global position.
        scale: of the logits; D ** -0.5 by default.
        return_lse: return the log-sum-exp as well.
        timers: an `lhcp.Timers` to measure steps with; not used under torch.compile.

    Returns:
        out [B, N / W, H, D] in the dtype of q; with return_lse also lse [B, H, N / W], natural log,
        float32 (float64 for float64 inputs), which carries no gradient.

    Raises:
        TypeError, ValueError: shapes, dtypes, names or sizes that do not fit; raised before
            anything is sent.
        ImportError: an explicit backend's package is missing.
    """
    check_qkv(q, k, v)
    ranks = as_ranks(group)
    plan = make_plan(q, k, ranks, layout, rotation, backend, causal, scale, q.shape[1])
    plan.layout.check_seqlen(q.shape[1] * ranks.world_size)
    out, lse = attention(q, k, v, plan, timers)
    return (out, lse) if return_lse else out
