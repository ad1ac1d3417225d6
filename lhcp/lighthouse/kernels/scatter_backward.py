"""Gradient of scatter-back: sums over nested windows, and the part owed to the chunk before."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lhcp.kernel_launch import ceil_div, kernel
from lhcp.lighthouse.geometry import Geometry
from lhcp.lighthouse.kernels.primitives import (
    any_child,
    chunk_window,
    contiguous,
    empty_like_rows,
    level_offset,
    load_places,
    load_positions,
    row_mask,
    row_tile,
    rows_contiguous,
)

TILE, NUM_WARPS = 256, 1


@triton.jit
def own(b_sum, p_position, m_row, i_first, after_last, chunk_size):
    """Return the sum of a child of an entry, or 0 where it is of a later document.

    i_first: [R], the child's first token, which is `after_last` tokens after the entry's last.
    """
    if p_position is not None:
        b_position = load_positions(p_position, m_row, i_first, chunk_size)
        b_sum = tl.where((after_last <= b_position)[:, None], b_sum, 0.0)
    return b_sum


@triton.jit
def window_sum(
    p_dout,
    p_do,
    p_place,
    p_position,
    m_row,
    i_window,
    i_start,
    n,
    chunk_size,
    dout_stride,
    do_stride,
    LEVEL: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    STORE: tl.constexpr,
):
    """Sum the rows of dout that entry i_window - 1 of LEVEL serves in its chunk.

    With STORE, writes the sum to the entry's place and so for all windows inside this one: they
    nest in u = position + 1, so each row is read once for all levels. With documents a child's sum
    is all that it has of the entry's, or its first token is in a later one.

    p_dout, p_do: [R, DP] pointers to token 0 of the row's chunk and to place 0. p_position: [R], to
    the position of that token inside its document, or None.

    Returns:
        [R, DP] fp32.
    """
    if LEVEL == 0:
        i_token = i_window - 1
        mask = row_mask(m_row & (i_token >= 0) & (i_token < chunk_size), D, DP)
        p_token = p_dout + (i_token.to(tl.int64) * dout_stride)[:, None]
        b_sum = tl.load(p_token, mask=mask, other=0.0).to(tl.float32)
    else:
        b_sum = tl.zeros([p_dout.shape[0], DP], tl.float32)
        store_children = False
        if STORE:
            size = chunk_size // (P ** (LEVEL - 1))
            offset = level_offset(n, LEVEL - 1, P) + i_start // (P ** (LEVEL - 1))
            store_children = any_child(p_place, m_row, i_window * P - 1, size, offset, 1)
        if store_children:
            for c in tl.range(P, loop_unroll_factor=P if LEVEL == 1 else 1):
                b_child = window_sum(
                    p_dout, p_do, p_place, p_position, m_row, i_window * P + c, i_start, n,
                    chunk_size, dout_stride, do_stride, LEVEL - 1, P, D, DP, STORE,
                )  # fmt: skip
                i_first = (i_window * P + c) * (P ** (LEVEL - 1)) - 1
                b_sum += own(
                    b_child, p_position, m_row, i_first, c * (P ** (LEVEL - 1)), chunk_size
                )
        else:
            for c in tl.range(P, loop_unroll_factor=P if LEVEL == 1 else 1):
                b_child = window_sum(
                    p_dout, p_do, p_place, p_position, m_row, i_window * P + c, i_start, n,
                    chunk_size, dout_stride, do_stride, LEVEL - 1, P, D, DP, False,
                )  # fmt: skip
                i_first = (i_window * P + c) * (P ** (LEVEL - 1)) - 1
                b_sum += own(
                    b_child, p_position, m_row, i_first, c * (P ** (LEVEL - 1)), chunk_size
                )
    if STORE:
        size = chunk_size // (P**LEVEL)
        offset = level_offset(n, LEVEL, P) + i_start // (P**LEVEL)
        b_place = load_places(p_place, m_row, i_window - 1, size, offset)
        p_row = p_do + (b_place.to(tl.int64) * do_stride)[:, None]
        tl.store(p_row, b_sum.to(p_do.dtype.element_ty), mask=row_mask(b_place >= 0, D, DP))
    return b_sum


@kernel
@triton.jit
def scatter_backward_kernel(
    dout,
    row_of_entry,
    positions,
    do,
    n,
    subsequence,
    chunk_size,
    num_chunks,
    dout_stride_b,
    dout_stride_t,
    dout_stride_h,
    H: tl.constexpr,
    HK: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """Sum R (chunk, coarsest window, head) rows of windows. Grid: (tiles of rows, batch)."""
    windows = chunk_size // (P ** (L - 1)) + 1
    i_b = tl.program_id(1).to(tl.int64)
    i_row = tl.program_id(0) * R + tl.arange(0, R)
    i_head, i_window, i_chunk, i_start = chunk_window(i_row, windows, chunk_size, H)
    m_row = i_chunk < num_chunks
    o_d = tl.arange(0, DP)[None, :]
    i_first = i_start.to(tl.int64) * dout_stride_t + i_head.to(tl.int64) * dout_stride_h
    p_dout = dout + i_b * dout_stride_b + i_first[:, None] + o_d
    p_do = do + i_b * subsequence * (H * D) + (i_head * D)[:, None] + o_d
    p_place = row_of_entry + (i_b * HK + i_head // (H // HK)) * level_offset(n, L, P)
    p_position = positions
    if positions is not None:
        p_position = positions + i_b * n + i_start
    window_sum(
        p_dout, p_do, p_place, p_position, m_row, i_window, i_start, n, chunk_size, dout_stride_t,
        H * D, L - 1, P, D, DP, True,
    )  # fmt: skip


def scatter_backward(
    dout: Tensor, row_of_entry: Tensor, geom: Geometry, positions: Tensor | None = None
) -> Tensor:
    """Sum, for each entry, the rows of `dout` that it serves in its chunk: `scatter`'s gradient.

    Args:
        dout: [B, n, H, D]. row_of_entry: [B, Hk, pyramid_size] int32.
        positions: [B, n] int32 inside documents; an entry then has served its own alone.

    Returns:
        [B, S, H, D] in the dtype of `dout`, summed in fp32, rounded once.
    """
    batch, _, num_heads, head_dim = dout.shape
    dout = rows_contiguous(dout)
    do = empty_like_rows(dout, geom.subsequence)
    rows, padded = row_tile(head_dim, TILE)
    windows = geom.level_size(geom.num_levels - 1) + geom.num_chunks
    scatter_backward_kernel.launch(
        (ceil_div(windows * num_heads, rows), batch),
        (
            dout,
            row_of_entry.contiguous(),
            contiguous(positions),
            do,
            geom.num_tokens,
            geom.subsequence,
            geom.chunk_size,
            geom.num_chunks,
            *dout.stride()[:3],
        ),
        num_warps=NUM_WARPS,
        H=num_heads,
        HK=row_of_entry.shape[1],
        R=rows,
        L=geom.num_levels,
        P=geom.pool_factor,
        D=head_dim,
        DP=padded,
    )
    return do


@kernel
@triton.jit
def edge_grads_kernel(
    dout,
    positions,
    dhalo,
    n,
    chunk_size,
    num_chunks,
    dout_stride_b,
    dout_stride_t,
    dout_stride_h,
    H: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """Sum the first rows of R (chunk, head) pairs. Grid: (tiles of pairs, batch)."""
    i_b = tl.program_id(1).to(tl.int64)
    i_row = tl.program_id(0) * R + tl.arange(0, R)
    i_head, _, i_chunk, i_start = chunk_window(i_row, 1, chunk_size, H)
    m_row = i_chunk < num_chunks
    o_d = tl.arange(0, DP)[None, :]
    i_first = i_start.to(tl.int64) * dout_stride_t + i_head.to(tl.int64) * dout_stride_h
    p_dout = dout + i_b * dout_stride_b + i_first[:, None] + o_d
    i_halo = (i_b * num_chunks + i_chunk) * (L - 1) * H + i_head
    p_dhalo = dhalo + (i_halo * D)[:, None] + o_d
    b_sum = tl.zeros([R, DP], tl.float32)
    p_position = positions
    if positions is not None:
        p_position = positions + i_b * n + i_start
    for level in tl.static_range(1, L):
        for c in range(1, P):
            b_child = window_sum(
                p_dout, p_dout, dout, p_position, m_row, tl.zeros_like(i_row) + c, i_start, n,
                chunk_size, dout_stride_t, 0, level - 1, P, D, DP, False,
            )  # fmt: skip
            after_last = c * (P ** (level - 1))
            i_child = tl.zeros_like(i_row) + (after_last - 1)
            b_sum += own(b_child, p_position, m_row, i_child, after_last, chunk_size)
        tl.store(p_dhalo + (level - 1) * (H * D), b_sum, mask=row_mask(m_row, D, DP))


def edge_grads(dout: Tensor, geom: Geometry, positions: Tensor | None = None) -> Tensor:
    """Sum, per chunk and level, the first p**level - 1 rows of `dout`: the halo's gradient.

    Args:
        dout: [B, n, H, D]. positions: as in `scatter_backward`.

    Returns:
        [B, num_chunks, L-1, H, D] fp32.
    """
    batch, _, num_heads, head_dim = dout.shape
    dout = rows_contiguous(dout)
    shape = (batch, geom.num_chunks, geom.num_levels - 1, num_heads, head_dim)
    dhalo = torch.empty(shape, dtype=torch.float32, device=dout.device)
    rows, padded = row_tile(head_dim, TILE)
    edge_grads_kernel.launch(
        (ceil_div(geom.num_chunks * num_heads, rows), batch),
        (
            dout,
            contiguous(positions),
            dhalo,
            geom.num_tokens,
            geom.chunk_size,
            geom.num_chunks,
            *dout.stride()[:3],
        ),
        num_warps=NUM_WARPS,
        H=num_heads,
        R=rows,
        L=geom.num_levels,
        P=geom.pool_factor,
        D=head_dim,
        DP=padded,
    )
    return dhalo
