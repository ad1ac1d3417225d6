"""Scatter-back as bounded sums of reads, and its edges between chunks."""

import triton
import triton.language as tl
from torch import Tensor

from lhcp.kernel_launch import ceil_div, kernel
from lhcp.lighthouse.geometry import Geometry
from lhcp.lighthouse.kernels.primitives import (
    chunk_window,
    contiguous,
    empty_like_rows,
    level_offset,
    load_places,
    load_positions,
    row_mask,
    row_of_level,
    row_tile,
    rows_at,
    rows_contiguous,
    spread,
)

TILE, NUM_WARPS = 256, 1


@kernel
@triton.jit
def scatter_kernel(
    o,
    row_of_entry,
    positions,
    out,
    n,
    chunk_size,
    num_chunks,
    o_stride_b,
    o_stride_s,
    o_stride_h,
    H: tl.constexpr,
    HK: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """Write R (chunk, coarsest window, head) rows of windows. Grid: (tiles of rows, batch)."""
    W: tl.constexpr = P ** (L - 1)
    # Windows are cut in u = position + 1, so the last position has one of its own.
    windows = chunk_size // W + 1
    i_b = tl.program_id(1).to(tl.int64)
    i_row = tl.program_id(0) * R + tl.arange(0, R)
    i_head, i_window, i_chunk, i_start = chunk_window(i_row, windows, chunk_size, H)
    m_row = i_chunk < num_chunks
    o_d = tl.arange(0, DP)[None, :]
    p_o = o + i_b * o_stride_b + (i_head.to(tl.int64) * o_stride_h)[:, None] + o_d
    p_out = out + (((i_b * n + i_start) * H + i_head) * D)[:, None] + o_d
    p_place = row_of_entry + (i_b * HK + i_head // (H // HK)) * level_offset(n, L, P)
    offset = level_offset(n, L - 1, P) + i_start // W
    b_place = load_places(p_place, m_row, i_window - 1, chunk_size // W, offset)
    b_row = rows_at(p_o, b_place, o_stride_s, D, DP)
    p_position = positions
    if positions is not None:
        p_position = positions + i_b * n + i_start
    b_row, b_bound = row_of_level(b_row, p_position, m_row, i_window - 1, chunk_size, W, False)
    spread(
        p_out, p_o, p_place, m_row, i_window, i_start, (b_row,), (b_bound,), p_position, n,
        chunk_size, H * D, o_stride_s, L - 1, L, P, D, DP, 1, False,
    )  # fmt: skip


def scatter(
    o: Tensor, row_of_entry: Tensor, geom: Geometry, positions: Tensor | None = None
) -> Tensor:
    """Sum, for each position, the rows of its entries in the same chunk, from level 0 upwards.

    Args:
        o: [B, S, H, D]. row_of_entry: [B, Hk, pyramid_size] int32.
        positions: [B, n] int32 inside documents; an entry then serves its own alone.

    Returns:
        [B, n, H, D] in the dtype of `o`, rounded once. See `scatter_edges` for what it lacks.
    """
    batch, _, num_heads, head_dim = o.shape
    o = rows_contiguous(o)
    out = empty_like_rows(o, geom.num_tokens)
    rows, padded = row_tile(head_dim, TILE)
    windows = geom.level_size(geom.num_levels - 1) + geom.num_chunks
    scatter_kernel.launch(
        (ceil_div(windows * num_heads, rows), batch),
        (
            o,
            row_of_entry.contiguous(),
            contiguous(positions),
            out,
            geom.num_tokens,
            geom.chunk_size,
            geom.num_chunks,
            *o.stride()[:3],
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
    return out


@kernel
@triton.jit
def scatter_edges_kernel(
    out,
    o,
    row_of_entry,
    positions,
    halo,
    n,
    chunk_size,
    num_chunks,
    out_stride_b,
    out_stride_t,
    out_stride_h,
    o_stride_b,
    o_stride_s,
    o_stride_h,
    halo_stride_b,
    halo_stride_c,
    halo_stride_l,
    halo_stride_h,
    H: tl.constexpr,
    HK: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """Sum R (chunk, position, head) rows anew, reading the halo. Grid: (tiles of rows, batch)."""
    i_b = tl.program_id(1).to(tl.int64)
    i_row = tl.program_id(0) * R + tl.arange(0, R)
    edge = tl.minimum(P ** (L - 1) - 1, chunk_size)
    i_head, i_token, i_chunk, i_start = chunk_window(i_row, edge, chunk_size, H)
    m_row = i_chunk < num_chunks
    o_d = tl.arange(0, DP)[None, :]
    i_head64 = i_head.to(tl.int64)
    p_o = o + i_b * o_stride_b + (i_head64 * o_stride_h)[:, None] + o_d
    p_halo = halo + i_b * halo_stride_b
    p_halo += (i_chunk.to(tl.int64) * halo_stride_c + i_head64 * halo_stride_h)[:, None] + o_d
    p_place = row_of_entry + (i_b * HK + i_head // (H // HK)) * level_offset(n, L, P)
    b_out = tl.zeros([R, DP], tl.float32)
    for level in tl.static_range(L):
        i_entry = (i_token + 1) // (P**level) - 1
        offset = level_offset(n, level, P) + i_start // (P**level)
        b_place = load_places(p_place, m_row, i_entry, chunk_size // (P**level), offset)
        b_row = rows_at(p_o, b_place, o_stride_s, D, DP)
        if level > 0:
            m_halo = row_mask(m_row & (i_entry < 0), D, DP)
            b_row += tl.load(p_halo + (level - 1) * halo_stride_l, mask=m_halo, other=0.0).to(
                tl.float32
            )
            if positions is not None:
                p_position = positions + i_b * n + i_start
                b_position = load_positions(p_position, m_row, i_token, chunk_size)
                m_own = (i_token + 1) % (P**level) <= b_position
                b_row = tl.where(m_own[:, None], b_row, 0.0)
        b_out += b_row
    p_out = out + i_b * out_stride_b + (i_head64 * out_stride_h)[:, None] + o_d
    p_out += ((i_start + i_token).to(tl.int64) * out_stride_t)[:, None]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=row_mask(m_row, D, DP))


def scatter_edges(
    out: Tensor,
    o: Tensor,
    row_of_entry: Tensor,
    halo: Tensor,
    geom: Geometry,
    positions: Tensor | None = None,
) -> None:
    """Complete, in place, the positions that the last entries of the chunk before also serve.

    Args:
        out: [B, n, H, D] from `scatter`; overwritten at p**(L-1) - 1 positions a chunk.
        o: [B, S, H, D]. row_of_entry: [B, Hk, pyramid_size] int32.
        halo: [B, num_chunks, L-1, H, D] in the dtype of `o`, zero rows where nothing is owed.
        positions: as in `scatter`.
    """
    batch, _, num_heads, head_dim = o.shape
    o, halo = rows_contiguous(o), rows_contiguous(halo)
    assert out.stride(-1) == 1
    rows, padded = row_tile(head_dim, TILE)
    edge = min(geom.window(geom.num_levels - 1) - 1, geom.chunk_size)
    grid = (ceil_div(geom.num_chunks * edge * num_heads, rows), batch)
    scatter_edges_kernel.launch(
        grid,
        (
            out,
            o,
            row_of_entry.contiguous(),
            contiguous(positions),
            halo,
            geom.num_tokens,
            geom.chunk_size,
            geom.num_chunks,
            *out.stride()[:3],
            *o.stride()[:3],
            *halo.stride()[:4],
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
