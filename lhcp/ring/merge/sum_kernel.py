"""The sum of parts as one Triton kernel: each part is read once, the sum written once."""

import triton
import triton.language as tl
from torch import Tensor

from lhcp.kernel_launch import ceil_div, kernel, next_power_of_2
from lhcp.ring.kv import KV


@kernel
@triton.jit
def _sum_kernel(
    p_parts,
    p_own_k,
    p_own_v,
    p_out_k,
    p_out_v,
    num_parts,
    first,
    B,
    T,
    CHUNK,
    s_own_k_b,
    s_own_k_t,
    s_own_v_b,
    s_own_v_t,
    s_out_k_b,
    s_out_k_t,
    s_out_v_b,
    s_out_v_t,
    HD: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    HAS_OWN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Sum parts, of the last T rows of a chunk of CHUNK.

    Example: 3 parts, first=2: chunk 0 sums parts 0 and 1, chunk 1 sums part 2.
    """
    i_t, i_slot, i_kb = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_kind, i_b = i_kb // B, (i_kb % B).to(tl.int64)
    o_t = (i_t * BT + tl.arange(0, BT)).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_td = (o_t < T)[:, None] & (o_d < HD)[None, :]
    o_row = (i_slot.to(tl.int64) + 1) * CHUNK - T + o_t

    b_sum = tl.full([BT, BD], 0.0, WIDE)
    if HAS_OWN:
        p_own = p_own_k if i_kind == 0 else p_own_v
        s_b = s_own_k_b if i_kind == 0 else s_own_v_b
        s_t = s_own_k_t if i_kind == 0 else s_own_v_t
        p_rows = p_own + i_b * s_b + o_row[:, None] * s_t + o_d[None, :]
        b_sum += tl.load(p_rows, mask=m_td, other=0.0).to(WIDE)
    start = tl.where(i_slot == 0, 0, first)
    stop = tl.where(i_slot == 0, first, num_parts)
    s_part = tl.cast(B, tl.int64) * T * HD
    p_part = p_parts + (i_kind.to(tl.int64) * num_parts + start) * s_part
    p_part += (i_b * T + o_t[:, None]) * HD + o_d[None, :]
    for _ in range(start, stop):
        b_sum += tl.load(p_part, mask=m_td, other=0.0).to(WIDE)
        p_part += s_part
    p_out = p_out_k if i_kind == 0 else p_out_v
    s_b = s_out_k_b if i_kind == 0 else s_out_v_b
    s_t = s_out_k_t if i_kind == 0 else s_out_v_t
    p_rows = p_out + i_b * s_b + o_row[:, None] * s_t + o_d[None, :]
    tl.store(p_rows, b_sum.to(p_out.dtype.element_ty), mask=m_td)


def _rows_together(x: Tensor) -> Tensor:
    """Return [B, tokens, heads, D] whose heads and D lie together: itself, or a copy."""
    together = x.stride(3) == 1 and (x.shape[2] == 1 or x.stride(2) == x.shape[3])
    return x if together else x.contiguous()


def sum_fused(parts: Tensor, first: int, own: KV | None, out: KV, chunk: int) -> None:
    """Sum as `lhcp.ring.merge.sum_parts.sum_parts`, in float32."""
    _, num_parts, batch, tokens, heads, head_dim = parts.shape
    width = heads * head_dim
    block = next_power_of_2(width)
    rows = max(1, 1024 // block)
    # A block may return heads that lie apart; the kernel reads heads and D as one row.
    given = out if own is None else own.map(_rows_together)
    strides = [stride for x in (*given, *out) for stride in x.stride()[:2]]
    assert all(_rows_together(x) is x for x in out), "sums are written in rows that lie together"
    _sum_kernel.launch(
        (ceil_div(tokens, rows), out[0].shape[1] // chunk, 2 * batch),
        (
            parts,
            *given,
            *out,
            num_parts,
            first,
            batch,
            tokens,
            chunk,
            *strides,
        ),
        num_warps=4,
        HD=width,
        BT=rows,
        BD=block,
        HAS_OWN=own is not None,
        WIDE=tl.float32,
    )
