"""The rows that chunks owe the next ones, and their gradients, in one small launch each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lhcp.kernel_launch import kernel, next_power_of_2
from lhcp.lighthouse.geometry import Geometry
from lhcp.lighthouse.kernels.primitives import level_offset, rows_contiguous


@kernel
@triton.jit
def last_rows_kernel(
    o,
    row_of_entry,
    rows,
    n,
    chunk_size,
    num_chunks,
    o_stride_b,
    o_stride_s,
    o_stride_h,
    H: tl.constexpr,
    HK: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """Copy the L-1 rows of one chunk and head. Grid: (chunks * heads, batch).

    Chunks of 32 tokens, p=4, L=3: chunk 1 owes entry 15 of level 1 and entry 3 of level 2.
    """
    i_b = tl.program_id(1).to(tl.int64)
    i_chunk, i_head = tl.program_id(0) // H, tl.program_id(0) % H
    o_d = tl.arange(0, DP)
    p_place = row_of_entry + (i_b * HK + i_head // (H // HK)) * level_offset(n, L, P)
    p_o = o + i_b * o_stride_b + i_head.to(tl.int64) * o_stride_h + o_d
    p_rows = rows + ((i_b * num_chunks + i_chunk) * (L - 1) * H + i_head) * D + o_d
    for level in tl.static_range(1, L):
        entry = (i_chunk + 1) * (chunk_size // (P**level)) - 1
        # One place for all lanes, loaded as a vector for the sake of the mask.
        b_place = tl.load(p_place + level_offset(n, level, P) + entry + o_d * 0).to(tl.int64)
        m_row = (o_d < D) & (b_place >= 0)
        b_row = tl.load(p_o + b_place * o_stride_s, mask=m_row, other=0.0)
        tl.store(p_rows + (level - 1) * H * D, b_row, mask=o_d < D)


def last_rows(o: Tensor, row_of_entry: Tensor, geom: Geometry) -> Tensor:
    """Read, for each chunk, the row of the last entry of levels 1 to L-1, zero where it is absent.

    Args:
        o: [B, S, H, D]. row_of_entry: [B, Hk, pyramid_size] int32.

    Returns:
        [B, num_chunks, L-1, H, D] in the dtype of `o`.
    """
    batch, _, num_heads, head_dim = o.shape
    o = rows_contiguous(o)
    shape = (batch, geom.num_chunks, geom.num_levels - 1, num_heads, head_dim)
    rows = torch.empty(shape, dtype=o.dtype, device=o.device)
    last_rows_kernel.launch(
        (geom.num_chunks * num_heads, batch),
        (
            o,
            row_of_entry.contiguous(),
            rows,
            geom.num_tokens,
            geom.chunk_size,
            geom.num_chunks,
            *o.stride()[:3],
        ),
        num_warps=1,
        H=num_heads,
        HK=row_of_entry.shape[1],
        L=geom.num_levels,
        P=geom.pool_factor,
        D=head_dim,
        DP=next_power_of_2(head_dim),
    )
    return rows


@kernel
@triton.jit
def add_last_grads_kernel(
    do,
    dout,
    received,
    row_of_entry,
    n,
    chunk_size,
    num_chunks,
    do_stride_b,
    do_stride_s,
    do_stride_h,
    dout_stride_b,
    dout_stride_t,
    dout_stride_h,
    received_stride_b,
    received_stride_c,
    received_stride_l,
    received_stride_h,
    H: tl.constexpr,
    HK: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """Write the L-1 gradients of one chunk and head. Grid: (chunks * heads, batch)."""
    i_b = tl.program_id(1).to(tl.int64)
    i_chunk, i_head = tl.program_id(0) // H, (tl.program_id(0) % H).to(tl.int64)
    o_d = tl.arange(0, DP)
    i_last = ((i_chunk + 1) * chunk_size - 1).to(tl.int64)
    p_dout = dout + i_b * dout_stride_b + i_last * dout_stride_t + i_head * dout_stride_h + o_d
    b_own = tl.load(p_dout, mask=o_d < D, other=0.0).to(tl.float32)
    p_place = row_of_entry + (i_b * HK + i_head // (H // HK)) * level_offset(n, L, P)
    p_do = do + i_b * do_stride_b + i_head * do_stride_h + o_d
    p_received = received + i_b * received_stride_b + i_chunk.to(tl.int64) * received_stride_c
    p_received += i_head * received_stride_h + o_d
    for level in tl.static_range(1, L):
        entry = (i_chunk + 1) * (chunk_size // (P**level)) - 1
        # One place for all lanes, loaded as a vector for the sake of the mask.
        b_place = tl.load(p_place + level_offset(n, level, P) + entry + o_d * 0).to(tl.int64)
        b_grad = tl.load(p_received + (level - 1) * received_stride_l, mask=o_d < D, other=0.0)
        b_sum = (b_own + b_grad).to(do.dtype.element_ty)
        tl.store(p_do + b_place * do_stride_s, b_sum, mask=(o_d < D) & (b_place >= 0))


def add_last_grads(
    do: Tensor, dout: Tensor, received: Tensor, row_of_entry: Tensor, geom: Geometry
) -> None:
    """Complete, in place, the gradients of the rows of `last_rows`, summed in fp32.

    Args:
        do: [B, S, H, D] from `scatter_backward`. dout: [B, n, H, D]. In all the last axis lies
            together.
        received: [B, num_chunks, L-1, H, D] fp32, zero where nothing was owed.
        row_of_entry: [B, Hk, pyramid_size] int32.
    """
    batch, _, num_heads, head_dim = do.shape
    dout, received = rows_contiguous(dout), rows_contiguous(received)
    assert do.stride(-1) == 1
    add_last_grads_kernel.launch(
        (geom.num_chunks * num_heads, batch),
        (
            do,
            dout,
            received,
            row_of_entry.contiguous(),
            geom.num_tokens,
            geom.chunk_size,
            geom.num_chunks,
            *do.stride()[:3],
            *dout.stride()[:3],
            *received.stride()[:4],
        ),
        num_warps=1,
        H=num_heads,
        HK=row_of_entry.shape[1],
        L=geom.num_levels,
        P=geom.pool_factor,
        D=head_dim,
        DP=next_power_of_2(head_dim),
    )
