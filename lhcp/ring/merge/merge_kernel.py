"""The merge as one Triton kernel: each partial is read once, the result written once."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from lhcp.kernel_launch import ceil_div, kernel, next_power_of_2
from lhcp.ring.merge.partial import Partial


@triton.jit
def _covered(runs, i: tl.constexpr, o_h, o_s):
    """Return which of these rows and heads partial i covers."""
    m_rows = (o_s >= runs[4 * i]) & (o_s < runs[4 * i + 1])
    return m_rows & (o_h >= runs[4 * i + 2]) & (o_h < runs[4 * i + 3])


@triton.jit
def _load_lse(p_lses, runs, s_lses, i: tl.constexpr, i_b, i_h, o_h, o_s):
    """Load the lse of partial i, -inf where it does not cover."""
    o_own, i_own = o_s - runs[4 * i], i_h - runs[4 * i + 2]
    p_rows = p_lses[i] + i_b * s_lses[3 * i] + i_own * s_lses[3 * i + 1]
    p_rows += o_own * s_lses[3 * i + 2]
    return tl.load(p_rows, mask=_covered(runs, i, o_h, o_s), other=float("-inf"))


@kernel
@triton.jit
def _merge_kernel(
    p_out,
    p_lse,
    p_partials,
    p_lses,
    runs,
    s_partials,
    s_lses,
    S,
    H,
    D,
    s_out_b,
    s_out_s,
    s_out_h,
    s_lse_b,
    s_lse_h,
    s_lse_s,
    N: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
):
    """Merge, or add.

    Example: N=2 partials; runs holds rows [start, stop) and heads [start, stop) of partial 0, then
    of partial 1; s_partials strides (b, s, h) of partial 0, then those of partial 1.
    """
    # Heads are neighbours in memory: programs beside one another read what lies together.
    i_s, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    i_b = tl.program_id(1).to(tl.int64)
    o_s = (i_s * BS + tl.arange(0, BS)).to(tl.int64)[:, None]
    # A block too: the interpreter takes no mask that is made with a scalar.
    o_h = i_h + tl.zeros([BS, 1], tl.int32)
    o_d = tl.arange(0, BD)[None, :]
    m_s, m_d = o_s < S, o_d < D

    b_top = tl.full([BS, 1], float("-inf"), tl.float32)
    if WEIGHTED:
        for i in tl.static_range(N):
            b_own = _load_lse(p_lses, runs, s_lses, i, i_b, i_h, o_h, o_s)
            b_top = tl.maximum(b_top, b_own)
    # Nothing weighs nothing: exp(-inf - 0), not exp(-inf - -inf).
    b_base = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_sum = tl.full([BS, 1], 0.0, tl.float32)
    b_out = tl.full([BS, BD], 0.0, tl.float32)
    for i in tl.static_range(N):
        o_own, i_own = o_s - runs[4 * i], i_h - runs[4 * i + 2]
        p_rows = p_partials[i] + i_b * s_partials[3 * i] + i_own * s_partials[3 * i + 2]
        p_rows += o_own * s_partials[3 * i + 1] + o_d
        m_rows = _covered(runs, i, o_h, o_s) & m_d
        b_partial = tl.load(p_rows, mask=m_rows, other=0.0).to(tl.float32)
        if WEIGHTED:
            b_own = _load_lse(p_lses, runs, s_lses, i, i_b, i_h, o_h, o_s)
            b_weight = tl.exp(b_own - b_base)
            b_sum += b_weight
            b_partial *= b_weight
        b_out += b_partial
    if WEIGHTED:
        b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
        b_out /= b_sum
        p_total = p_lse + i_b * s_lse_b + i_h * s_lse_h + o_s * s_lse_s
        tl.store(p_total, b_top + tl.log(b_sum), mask=m_s)
    p_rows = p_out + i_b * s_out_b + i_h * s_out_h + o_s * s_out_s + o_d
    tl.store(p_rows, b_out.to(p_out.dtype.element_ty), mask=m_s & m_d)


def merge_fused(out: Tensor, lse: Tensor, partials: Sequence[Partial]) -> None:
    """Merge as `lhcp.ring.merge.merge.merge`; the last axis of outputs is contiguous."""
    lses = [partial.lse for partial in partials if partial.lse is not None]
    _launch(out, lse, partials, lses, weighted=True)


def add_fused(out: Tensor, partials: Sequence[Partial]) -> None:
    """Sum as `lhcp.ring.merge.merge.add`, in float32; the last axis is contiguous."""
    # What is not read must still be among the arguments.
    _launch(out, out[..., 0], partials, [partial.x for partial in partials], weighted=False)


def _launch(
    out: Tensor, lse: Tensor, partials: Sequence[Partial], lses: Sequence[Tensor], weighted: bool
) -> None:
    batch, seqlen, heads, head_dim = out.shape
    rows = 16
    # A block may return results whose D does not lie together.
    given = [p.x if p.x.stride(3) == 1 else p.x.contiguous() for p in partials]
    runs = [edge for partial in partials for edge in (*partial.rows, *partial.heads)]
    _merge_kernel.launch(
        (ceil_div(seqlen, rows) * heads, batch),
        (
            out,
            lse,
            tuple(given),
            tuple(lses),
            tuple(runs),
            tuple(stride for x in given for stride in x.stride()[:3]),
            tuple(stride for x in lses for stride in x.stride()[:3]),
            seqlen,
            heads,
            head_dim,
            *out.stride()[:3],
            *lse.stride(),
        ),
        num_warps=2,
        N=len(partials),
        WEIGHTED=weighted,
        BS=rows,
        BD=next_power_of_2(head_dim),
    )
