"""Device helpers shared by the kernels, and the sizes of their tiles.

Rows are [R, DP] tiles: R heads (or entries) of head_dim D, padded to a power of two and masked.

`positions` are those of tokens inside their documents (lhcp/lighthouse/documents.py has the rules);
None, a constant: there are no documents, and a kernel is compiled without them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lhcp.kernel_launch import next_power_of_2


def row_tile(head_dim: int, elements: int) -> tuple[int, int]:
    """Return rows and padded head_dim of a tile of about `elements` elements."""
    padded = next_power_of_2(head_dim)
    return max(1, elements // padded), padded


def rows_contiguous(x: Tensor) -> Tensor:
    """Return `x` with a contiguous last dim, copied only if it has another stride."""
    return x if x.stride(-1) == 1 else x.contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    """Return what is given with its elements together in memory."""
    return None if x is None else x.contiguous()


def empty_like_rows(x: Tensor, length: int) -> Tensor:
    """Allocate [B, length, heads, D] for `x` of [B, n, heads, D], contiguous."""
    shape = (x.shape[0], length, x.shape[2], x.shape[3])
    return torch.empty(shape, dtype=x.dtype, device=x.device)


@triton.jit
def level_offset(n, LEVEL: tl.constexpr, P: tl.constexpr):
    """Return the id of entry 0 of LEVEL for n tokens: n + n / P + ..., as Geometry.offset."""
    offset = 0
    for i in tl.static_range(LEVEL):
        offset += n // (P**i)
    return offset


@triton.jit
def chunk_window(i_row, windows, chunk_size, HEADS: tl.constexpr):
    """Split a flat row index into head, window of the chunk, chunk and its first token."""
    i_head = i_row % HEADS
    i_window = i_row // HEADS % windows
    i_chunk = i_row // HEADS // windows
    return i_head, i_window, i_chunk, i_chunk * chunk_size


@triton.jit
def row_mask(m_row, D: tl.constexpr, DP: tl.constexpr):
    """Spread the mask [R] of rows over the tile [R, DP], without columns from D on."""
    m_tile = m_row[:, None]
    if D != DP:
        m_tile = m_tile & (tl.arange(0, DP) < D)[None, :]
    return m_tile


@triton.jit
def rows_at(p_sub, b_place, stride, D: tl.constexpr, DP: tl.constexpr):
    """Load rows of the sub-sequence as fp32, zeros where the place is -1.

    p_sub: [R, DP] pointers to the rows of place 0. b_place: [R].
    """
    mask = row_mask(b_place >= 0, D, DP)
    return tl.load(p_sub + (b_place.to(tl.int64) * stride)[:, None], mask=mask, other=0.0).to(
        tl.float32
    )


@triton.jit
def load_places(p_place, m_row, i_entry, size, offset):
    """Load the places of entries i_entry [R] of one level of a chunk, -1 outside [0, size)."""
    mask = m_row & (i_entry >= 0) & (i_entry < size)
    return tl.load(p_place + offset + i_entry, mask=mask, other=-1)


@triton.jit
def any_child(p_place, m_row, i_child, size, offset, SHIFT: tl.constexpr):
    """Return whether any row's window has a child in the sub-sequence; i_child [R] is its first.

    Siblings are in or out together. With SHIFT the first child belongs to the entry before.
    """
    b_place = load_places(p_place, m_row, i_child, size, offset)
    if SHIFT > 0:
        b_place = tl.maximum(b_place, load_places(p_place, m_row, i_child + 1, size, offset))
    return tl.max(b_place, 0) >= 0


@triton.jit
def load_positions(p_position, m_row, i_token, chunk_size):
    """Load the positions of tokens i_token [R] of a chunk inside their documents, 0 outside."""
    mask = m_row & (i_token >= 0) & (i_token < chunk_size)
    return tl.load(p_position + i_token, mask=mask, other=0)


@triton.jit
def several_documents(p_position, m_row, i_first, i_last, chunk_size):
    """Return whether any row's tokens i_first to i_last [R] of a chunk are of several documents.

    A selection that was made for these documents expands such windows; one that is given may not.
    """
    i_last = tl.minimum(i_last, chunk_size - 1)
    b_position = load_positions(p_position, m_row, i_last, chunk_size)
    return tl.max((m_row & (b_position < i_last - i_first)).to(tl.int32), 0) > 0


@triton.jit
def part_of_window(b_position, WINDOW: tl.constexpr):
    """Return 1 over the tokens of a window that are in its last one's document.

    b_position: of the window's last token. A whole window has the constant of no documents.
    """
    b_count = tl.minimum(b_position + 1, WINDOW).to(tl.float32)
    b_part = tl.div_rn(tl.full(b_count.shape, 1.0, tl.float32), b_count)
    return tl.where(b_position + 1 >= WINDOW, 1.0 / WINDOW, b_part)


@triton.jit
def row_of_level(
    b_row, p_position, m_row, i_entry, chunk_size, WINDOW: tl.constexpr, MEAN: tl.constexpr
):
    """Return the rows of entries i_entry [R] as tokens read them, and a bound: `reads`.

    With MEAN they are divided by the tokens that have a share in the entry.
    """
    i_last = (i_entry + 1) * WINDOW - 1
    if MEAN:
        if p_position is None:
            b_row *= 1.0 / WINDOW
        else:
            b_position = load_positions(p_position, m_row, i_last, chunk_size)
            b_row *= part_of_window(b_position, WINDOW)[:, None]
            i_last -= b_position
    return b_row, i_last


@triton.jit
def reads(b_bound, b_begin, i_token, SHIFT: tl.constexpr):
    """Return whether tokens are in the documents of entries.

    With SHIFT an entry is before the token: its bound, its last token, must not be before the
    token's document, which begins at b_begin. Without, the token is in the entry's window: it must
    not be before the bound, where the entry's document begins.
    """
    return b_bound >= b_begin if SHIFT > 0 else b_bound <= i_token


@triton.jit
def fold(
    rows, bounds, p_position, m_row, i_token, chunk_size, COUNT: tl.constexpr, SHIFT: tl.constexpr
):
    """Sum a tuple of tiles in order, for tokens i_token [R] that are in their documents."""
    if p_position is None:
        b_sum = rows[0]
        for i in tl.static_range(1, COUNT):
            b_sum += rows[i]
    else:
        b_begin = i_token
        if SHIFT > 0:
            b_begin = i_token - load_positions(p_position, m_row, i_token, chunk_size)
        b_sum = tl.where(reads(bounds[0], b_begin, i_token, SHIFT)[:, None], rows[0], 0.0)
        for i in tl.static_range(1, COUNT):
            b_sum += tl.where(reads(bounds[i], b_begin, i_token, SHIFT)[:, None], rows[i], 0.0)
    return b_sum


@triton.jit
def store_token(
    p_out, b_row, m_row, i_token, chunk_size, stride, D: tl.constexpr, DP: tl.constexpr
):
    """Store rows [R, DP] at tokens i_token [R] of their chunks, where they are inside."""
    mask = row_mask(m_row & (i_token >= 0) & (i_token < chunk_size), D, DP)
    p_token = p_out + (i_token.to(tl.int64) * stride)[:, None]
    tl.store(p_token, b_row.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def spread(
    p_out,
    p_sub,
    p_place,
    m_row,
    i_window,
    i_start,
    rows,
    bounds,
    p_position,
    n,
    chunk_size,
    out_stride,
    sub_stride,
    LEVEL: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    SHIFT: tl.constexpr,
    MEAN: tl.constexpr,
):
    """Write the positions of window i_window of LEVEL: each the sum of its entries' rows.

    Token t of a chunk reads, from level 0 upwards, entry (t + SHIFT) // P**l - SHIFT of each level
    l. With u = t + SHIFT the windows of all levels nest, so `rows`, the tiles of the levels from
    LEVEL up, are loaded once for all P**LEVEL positions; where no child is in the sub-sequence, one
    sum is stored to all of them.

    Example: P = 2, L = 3, SHIFT = 1. Window 1 of level 2 is u = 4..7, tokens 3..6: all read entry 0
    of level 2; tokens 3, 4 entry 1 and tokens 5, 6 entry 2 of level 1; token t entry t of level 0.

    p_out, p_sub: [R, DP] pointers to token 0 of the row's chunk and to place 0. p_place: [R],
    to the row's pyramid. i_start: [R], first token of the chunk. With MEAN, rows of level l are
    divided by P**l. bounds: of `rows`, as `row_of_level` has them. p_position: [R], to the position
    of the chunk's token 0, or None.
    """
    size = chunk_size // (P ** (LEVEL - 1))
    offset = level_offset(n, LEVEL - 1, P) + i_start // (P ** (LEVEL - 1))
    i_child = i_window * P - SHIFT
    if any_child(p_place, m_row, i_child, size, offset, SHIFT):
        if LEVEL == 1:
            for c in tl.static_range(P):
                i_token = i_child + c
                b_place = load_places(p_place, m_row, i_token, size, offset)
                b_row = rows_at(p_sub, b_place, sub_stride, D, DP)
                all_rows = (b_row,) + rows  # noqa: RUF005
                # A token is in the document of its own entry.
                all_bounds = (i_token,) + bounds  # noqa: RUF005
                b_sum = fold(all_rows, all_bounds, p_position, m_row, i_token, chunk_size, L, SHIFT)
                store_token(p_out, b_sum, m_row, i_token, chunk_size, out_stride, D, DP)
        else:
            for c in range(P):
                b_place = load_places(p_place, m_row, i_child + c, size, offset)
                b_row = rows_at(p_sub, b_place, sub_stride, D, DP)
                b_row, b_bound = row_of_level(
                    b_row, p_position, m_row, i_child + c, chunk_size, P ** (LEVEL - 1), MEAN
                )
                spread(
                    p_out,
                    p_sub,
                    p_place,
                    m_row,
                    i_window * P + c,
                    i_start,
                    (b_row,) + rows,  # noqa: RUF005
                    (b_bound,) + bounds,  # noqa: RUF005
                    p_position,
                    n,
                    chunk_size,
                    out_stride,
                    sub_stride,
                    LEVEL - 1,
                    L,
                    P,
                    D,
                    DP,
                    SHIFT,
                    MEAN,
                )
    else:
        i_first = i_window * (P**LEVEL) - SHIFT
        i_token = tl.maximum(i_first, 0)
        several = False
        if p_position is not None:
            i_last = i_first + P**LEVEL - 1
            several = several_documents(p_position, m_row, i_token, i_last, chunk_size)
        if several:
            for c in range(P**LEVEL):
                i_token = i_first + c
                b_sum = fold(rows, bounds, p_position, m_row, i_token, chunk_size, L - LEVEL, SHIFT)
                store_token(p_out, b_sum, m_row, i_token, chunk_size, out_stride, D, DP)
        else:
            b_shared = fold(rows, bounds, p_position, m_row, i_token, chunk_size, L - LEVEL, SHIFT)
            for c in tl.range(P**LEVEL, loop_unroll_factor=P):
                store_token(p_out, b_shared, m_row, i_first + c, chunk_size, out_stride, D, DP)
