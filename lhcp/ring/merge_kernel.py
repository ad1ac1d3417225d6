"""The merge as one Triton kernel: each row of each part is read once, the result written once."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _merge_kernel(
    p_out,
    p_lse,
    p_parts,
    p_part_lses,
    s_parts,
    s_part_lses,
    S,
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
    """Example: N=2 parts; s_parts holds strides (b, s, h) of part 0, then those of part 1."""
    i_s, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_s = (i_s * BS + tl.arange(0, BS)).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_s = o_s < S
    m_sd = m_s[:, None] & (o_d < D)[None, :]

    b_top = tl.full([BS], float("-inf"), tl.float32)
    b_sum = tl.full([BS], 0.0, tl.float32)
    if WEIGHTED:
        for i in tl.static_range(N):
            p_own = p_part_lses[i] + i_b * s_part_lses[3 * i] + i_h * s_part_lses[3 * i + 1]
            b_own = tl.load(p_own + o_s * s_part_lses[3 * i + 2], mask=m_s, other=0.0)
            b_top = tl.maximum(b_top, b_own)
        for i in tl.static_range(N):
            p_own = p_part_lses[i] + i_b * s_part_lses[3 * i] + i_h * s_part_lses[3 * i + 1]
            b_own = tl.load(p_own + o_s * s_part_lses[3 * i + 2], mask=m_s, other=0.0)
            b_sum += tl.exp(b_own - b_top)
    b_out = tl.full([BS, BD], 0.0, tl.float32)
    for i in tl.static_range(N):
        p_part = p_parts[i] + i_b * s_parts[3 * i] + i_h * s_parts[3 * i + 2]
        p_rows = p_part + o_s[:, None] * s_parts[3 * i + 1] + o_d[None, :]
        b_part = tl.load(p_rows, mask=m_sd, other=0.0).to(tl.float32)
        if WEIGHTED:
            p_own = p_part_lses[i] + i_b * s_part_lses[3 * i] + i_h * s_part_lses[3 * i + 1]
            b_own = tl.load(p_own + o_s * s_part_lses[3 * i + 2], mask=m_s, other=0.0)
            b_part *= (tl.exp(b_own - b_top) / b_sum)[:, None]
        b_out += b_part
    p_rows = p_out + i_b * s_out_b + i_h * s_out_h + o_s[:, None] * s_out_s + o_d[None, :]
    tl.store(p_rows, b_out.to(p_out.dtype.element_ty), mask=m_sd)
    if WEIGHTED:
        p_total = p_lse + i_b * s_lse_b + i_h * s_lse_h + o_s * s_lse_s
        tl.store(p_total, b_top + tl.log(b_sum), mask=m_s)


def merge_fused(
    out: Tensor, lse: Tensor, parts: Sequence[Tensor], part_lses: Sequence[Tensor]
) -> None:
    """Merge as `lhcp.ring.merge.merge`; the last axis of outputs is contiguous."""
    _launch(out, lse, parts, part_lses, weighted=True)


def add_fused(out: Tensor, parts: Sequence[Tensor]) -> None:
    """Sum as `lhcp.ring.merge.add`, in float32; the last axis is contiguous."""
    # What is not read still needs a place among the arguments.
    _launch(out, parts[0][..., 0].transpose(1, 2), parts, [x[..., 0] for x in parts], False)


def _launch(
    out: Tensor, lse: Tensor, parts: Sequence[Tensor], part_lses: Sequence[Tensor], weighted: bool
) -> None:
    batch, seqlen, heads, head_dim = out.shape
    rows = 32
    _merge_kernel[(triton.cdiv(seqlen, rows), heads, batch)](
        out,
        lse,
        tuple(parts),
        tuple(part_lses),
        tuple(stride for x in parts for stride in x.stride()[:3]),
        tuple(stride for x in part_lses for stride in x.stride()[:3]),
        seqlen,
        head_dim,
        *out.stride()[:3],
        *lse.stride(),
        N=len(parts),
        WEIGHTED=weighted,
        BS=rows,
        BD=triton.next_power_of_2(head_dim),
        num_warps=4,
    )
