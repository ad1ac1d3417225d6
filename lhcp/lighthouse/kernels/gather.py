"""One gather of q, k and v over all levels, and its gradient with that of the means."""

import triton
import triton.language as tl
from torch import Tensor

from lhcp.kernel_launch import ceil_div, kernel
from lhcp.lighthouse.geometry import Geometry
from lhcp.lighthouse.kernel_set import QKV
from lhcp.lighthouse.kernels.primitives import (
    contiguous,
    empty_like_rows,
    level_offset,
    row_mask,
    row_of_level,
    row_tile,
    rows_at,
    rows_contiguous,
    spread,
)

GATHER_TILE, GATHER_WARPS = 4096, 4
SPREAD_TILE, SPREAD_WARPS = 256, 1


@triton.jit
def copy_rows(
    p_x,
    p_pooled,
    p_out,
    b_entry,
    m_place,
    n,
    x_stride,
    pooled_stride,
    out_stride,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """Copy the rows of pyramid entries [R] of one head: level 0 from p_x, others from p_pooled."""
    o_d = tl.arange(0, DP)[None, :]
    b_id = b_entry.to(tl.int64)
    m_token = row_mask(m_place & (b_entry < n), D, DP)
    m_pooled = row_mask(m_place & (b_entry >= n), D, DP)
    b_token = tl.load(p_x + (b_id * x_stride)[:, None] + o_d, mask=m_token, other=0.0)
    p_row = p_pooled + ((b_id - n) * pooled_stride)[:, None] + o_d
    b_row = tl.load(p_row, mask=m_pooled, other=0.0)
    b_row = tl.where((b_entry < n)[:, None], b_token, b_row)
    i_place = tl.arange(0, b_entry.shape[0]).to(tl.int64)
    p_place = p_out + (i_place * out_stride)[:, None] + o_d
    tl.store(p_place, b_row, mask=row_mask(m_place, D, DP))


@kernel
@triton.jit
def gather_kernel(
    q,
    k,
    v,
    pq,
    pk,
    pv,
    entries,
    qs,
    ks,
    vs,
    n,
    subsequence,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    pq_stride_b,
    pq_stride_t,
    pq_stride_h,
    pk_stride_b,
    pk_stride_t,
    pk_stride_h,
    pv_stride_b,
    pv_stride_t,
    pv_stride_h,
    HK: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """Copy R rows of one head of q, k or v. Grid: (heads of q, k, v for each tile, batch)."""
    H: tl.constexpr = HK * G
    SLOTS: tl.constexpr = H + 2 * HK
    i_slot, i_tile = tl.program_id(0) % SLOTS, tl.program_id(0) // SLOTS
    i_b = tl.program_id(1).to(tl.int64)
    i_first = (i_tile * R).to(tl.int64)
    m_place = tl.arange(0, R) < subsequence - i_first
    i_kv = i_slot // G if i_slot < H else (i_slot - H) % HK
    p_entry = entries + (i_b * HK + i_kv) * subsequence + i_first + tl.arange(0, R)
    b_entry = tl.load(p_entry, mask=m_place, other=0)
    i_row = i_b * subsequence + i_first
    if i_slot < H:
        copy_rows(
            q + i_b * q_stride_b + i_slot.to(tl.int64) * q_stride_h,
            pq + i_b * pq_stride_b + i_slot.to(tl.int64) * pq_stride_h,
            qs + (i_row * H + i_slot) * D,
            b_entry, m_place, n, q_stride_t, pq_stride_t, H * D, D, DP,
        )  # fmt: skip
    elif i_slot < H + HK:
        copy_rows(
            k + i_b * k_stride_b + i_kv.to(tl.int64) * k_stride_h,
            pk + i_b * pk_stride_b + i_kv.to(tl.int64) * pk_stride_h,
            ks + (i_row * HK + i_kv) * D,
            b_entry, m_place, n, k_stride_t, pk_stride_t, HK * D, D, DP,
        )  # fmt: skip
    else:
        copy_rows(
            v + i_b * v_stride_b + i_kv.to(tl.int64) * v_stride_h,
            pv + i_b * pv_stride_b + i_kv.to(tl.int64) * pv_stride_h,
            vs + (i_row * HK + i_kv) * D,
            b_entry, m_place, n, v_stride_t, pv_stride_t, HK * D, D, DP,
        )  # fmt: skip


def gather(tokens: QKV, means: QKV, entries: Tensor, geom: Geometry) -> QKV:
    """Gather the rows of the entries in the sub-sequence.

    Args:
        tokens: q [B, n, H, D], k and v [B, n, Hk, D]. means: as many of [B, pooled_size, heads, D].
        entries: [B, Hk, S] int32.

    Returns:
        q [B, S, H, D], k and v [B, S, Hk, D] of the sub-sequence.
    """
    batch, _, num_heads, head_dim = tokens.q.shape
    num_kv_heads = tokens.k.shape[2]
    inputs = [rows_contiguous(x) for x in (*tokens, *means)]
    out = QKV(*(empty_like_rows(x, geom.subsequence) for x in tokens))
    rows, padded = row_tile(head_dim, GATHER_TILE)
    slots = num_heads + 2 * num_kv_heads
    gather_kernel.launch(
        (slots * ceil_div(geom.subsequence, rows), batch),
        (
            *inputs,
            entries.contiguous(),
            *out,
            geom.num_tokens,
            geom.subsequence,
            *(stride for x in inputs for stride in x.stride()[:3]),
        ),
        num_warps=GATHER_WARPS,
        HK=num_kv_heads,
        G=num_heads // num_kv_heads,
        R=rows,
        D=head_dim,
        DP=padded,
    )
    return out


@triton.jit
def gather_backward_rows(
    dsub,
    row_of_entry,
    positions,
    dx,
    i_tile,
    n,
    subsequence,
    dsub_stride_b,
    dsub_stride_s,
    dsub_stride_h,
    HEADS: tl.constexpr,
    HK: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """Write the gradients of R (coarsest window, head) pairs of one tensor."""
    i_b = tl.program_id(1).to(tl.int64)
    i_row = i_tile * R + tl.arange(0, R)
    i_window = i_row // HEADS
    i_head = i_row % HEADS
    m_row = i_window < n // (P ** (L - 1))
    o_d = tl.arange(0, DP)[None, :]
    p_sub = dsub + i_b * dsub_stride_b + (i_head.to(tl.int64) * dsub_stride_h)[:, None] + o_d
    p_dx = dx + i_b * n * (HEADS * D) + (i_head * D)[:, None] + o_d
    p_place = row_of_entry + (i_b * HK + i_head // (HEADS // HK)) * level_offset(n, L, P)
    b_place = tl.load(p_place + level_offset(n, L - 1, P) + i_window, mask=m_row, other=-1)
    b_row = rows_at(p_sub, b_place, dsub_stride_s, D, DP)
    p_position = positions
    if positions is not None:
        p_position = positions + i_b * n + tl.zeros_like(i_row)
    b_row, b_bound = row_of_level(b_row, p_position, m_row, i_window, n, P ** (L - 1), True)
    spread(
        p_dx, p_sub, p_place, m_row, i_window, tl.zeros_like(i_row), (b_row,), (b_bound,),
        p_position, n, n, HEADS * D, dsub_stride_s, L - 1, L, P, D, DP, 0, True,
    )  # fmt: skip


@kernel
@triton.jit
def gather_backward_kernel(
    dqs,
    dks,
    dvs,
    row_of_entry,
    positions,
    dq,
    dk,
    dv,
    n,
    subsequence,
    q_tiles,
    kv_tiles,
    dqs_stride_b,
    dqs_stride_s,
    dqs_stride_h,
    dks_stride_b,
    dks_stride_s,
    dks_stride_h,
    dvs_stride_b,
    dvs_stride_s,
    dvs_stride_h,
    HK: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """Spread gradients. Grid: (tiles of q, then k, then v, batch)."""
    i_tile = tl.program_id(0)
    if i_tile < q_tiles:
        gather_backward_rows(
            dqs, row_of_entry, positions, dq, i_tile, n, subsequence, dqs_stride_b, dqs_stride_s,
            dqs_stride_h, HK * G, HK, R, L, P, D, DP,
        )  # fmt: skip
    elif i_tile < q_tiles + kv_tiles:
        gather_backward_rows(
            dks, row_of_entry, positions, dk, i_tile - q_tiles, n, subsequence, dks_stride_b,
            dks_stride_s, dks_stride_h, HK, HK, R, L, P, D, DP,
        )  # fmt: skip
    else:
        gather_backward_rows(
            dvs, row_of_entry, positions, dv, i_tile - q_tiles - kv_tiles, n, subsequence,
            dvs_stride_b, dvs_stride_s, dvs_stride_h, HK, HK, R, L, P, D, DP,
        )  # fmt: skip


def gather_backward(
    grads: QKV, row_of_entry: Tensor, geom: Geometry, positions: Tensor | None = None
) -> QKV:
    """Compute the gradients of q, k, v through `gather` and the means.

    Each token sums, in fp32 from level 0 upwards, the rows of its entries over p**level.

    Args:
        grads: of the sub-sequence, q [B, S, H, D], k and v [B, S, Hk, D].
        row_of_entry: [B, Hk, pyramid_size] int32.
        positions: [B, n] int32 inside documents, whose tokens alone have a share in an entry.

    Returns:
        gradients of the tokens: q [B, n, H, D], k and v [B, n, Hk, D].
    """
    batch, _, num_heads, head_dim = grads.q.shape
    num_kv_heads = grads.k.shape[2]
    inputs = [rows_contiguous(x) for x in grads]
    out = QKV(*(empty_like_rows(x, geom.num_tokens) for x in inputs))
    rows, padded = row_tile(head_dim, SPREAD_TILE)
    windows = geom.level_size(geom.num_levels - 1)
    q_tiles = ceil_div(windows * num_heads, rows)
    kv_tiles = ceil_div(windows * num_kv_heads, rows)
    gather_backward_kernel.launch(
        (q_tiles + 2 * kv_tiles, batch),
        (
            *inputs,
            row_of_entry.contiguous(),
            contiguous(positions),
            *out,
            geom.num_tokens,
            geom.subsequence,
            q_tiles,
            kv_tiles,
            *(stride for x in inputs for stride in x.stride()[:3]),
        ),
        num_warps=SPREAD_WARPS,
        HK=num_kv_heads,
        G=num_heads // num_kv_heads,
        R=rows,
        L=geom.num_levels,
        P=geom.pool_factor,
        D=head_dim,
        DP=padded,
    )
    return out
