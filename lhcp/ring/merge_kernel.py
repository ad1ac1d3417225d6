"""The merge as one Triton kernel: each row of both outputs is read once and written once."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _merge_kernel(
    p_out,
    p_lse,
    p_block_out,
    p_block_lse,
    S,
    D,
    s_out_b,
    s_out_s,
    s_out_h,
    s_lse_b,
    s_lse_h,
    s_lse_s,
    s_block_b,
    s_block_s,
    s_block_h,
    s_block_lse_b,
    s_block_lse_h,
    s_block_lse_s,
    BS: tl.constexpr,
    BD: tl.constexpr,
):
    i_s, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_s = (i_s * BS + tl.arange(0, BS)).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_s = o_s < S
    m_sd = m_s[:, None] & (o_d < D)[None, :]

    p_own = p_lse + i_b * s_lse_b + i_h * s_lse_h + o_s * s_lse_s
    p_new = p_block_lse + i_b * s_block_lse_b + i_h * s_block_lse_h + o_s * s_block_lse_s
    b_own = tl.load(p_own, mask=m_s, other=0.0)
    b_new = tl.load(p_new, mask=m_s, other=0.0)
    b_top = tl.maximum(b_own, b_new)
    b_keep = tl.exp(b_own - b_top)
    b_take = tl.exp(b_new - b_top)
    b_sum = b_keep + b_take

    p_rows = p_out + i_b * s_out_b + i_h * s_out_h + o_s[:, None] * s_out_s + o_d[None, :]
    p_block = p_block_out + i_b * s_block_b + i_h * s_block_h
    p_block += o_s[:, None] * s_block_s + o_d[None, :]
    b_out = tl.load(p_rows, mask=m_sd, other=0.0).to(tl.float32)
    b_block = tl.load(p_block, mask=m_sd, other=0.0).to(tl.float32)
    b_out = b_out * (b_keep / b_sum)[:, None] + b_block * (b_take / b_sum)[:, None]
    tl.store(p_rows, b_out.to(p_out.dtype.element_ty), mask=m_sd)
    tl.store(p_own, b_top + tl.log(b_sum), mask=m_s)


def merge_fused(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merge in place, as `lhcp.ring.merge.merge`; the last axis of both outputs is contiguous."""
    batch, seqlen, heads, head_dim = out.shape
    rows = 32
    _merge_kernel[(triton.cdiv(seqlen, rows), heads, batch)](
        out,
        lse,
        block_out,
        block_lse,
        seqlen,
        head_dim,
        *out.stride()[:3],
        *lse.stride(),
        *block_out.stride()[:3],
        *block_lse.stride(),
        BS=rows,
        BD=triton.next_power_of_2(head_dim),
        num_warps=4,
    )
