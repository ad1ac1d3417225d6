"""Mean pooling of q, k and v with the scores of q and k, in one pass over level 0."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lhcp.kernel_launch import ceil_div, kernel, next_power_of_2
from lhcp.lighthouse.geometry import Geometry
from lhcp.lighthouse.kernel_set import QKV, Pooled
from lhcp.lighthouse.kernels.primitives import (
    contiguous,
    empty_like_rows,
    level_offset,
    part_of_window,
    row_mask,
    row_tile,
)

# Note [One reduction order]
# A token's score must have the same bits however the sequence is sharded. How a compiled kernel
# adds up a row depends on its tile, its warps and how wide it loads, so all three are functions of
# head_dim and dtype alone: every tile has TILE elements (padded where there are fewer heads), and
# inputs whose strides or address would narrow the loads are copied first.
TILE = 1024
NUM_WARPS = 4
STRIDE_UNIT = 16


@triton.jit
def pool_window(
    p_x,
    p_mean,
    p_score,
    p_position,
    m_row,
    m_group,
    i_window,
    n,
    x_stride,
    mean_stride,
    LEVEL: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    GP: tl.constexpr,
    MEAN: tl.constexpr,
    SCORE: tl.constexpr,
):
    """Sum the rows of window i_window of LEVEL, storing means and scores of its levels >= 1.

    Example: P = 2, LEVEL = 2, rows 1, 2, 3, 4: stores 1.5 and 3.5 at level 1, 2.5 at level 2, and
    scores 4, 16 and 16.

    p_x, p_mean: [R, DP] pointers to token 0 and to pooled entry 0. p_score: [R / GP], to pooled
    entry 0. p_position: to token 0's position inside its document, or None; a child whose last
    token is not in the document of the window's last one has none that is. GP: rows of one group,
    padded to a power of two.

    Returns:
        fp32 sum [R, DP], largest squared norm of each row's head [R].
    """
    if LEVEL == 0:
        p_row = p_x + i_window.to(tl.int64) * x_stride
        b_sum = tl.load(p_row, mask=row_mask(m_row, D, DP), other=0.0).to(tl.float32)
        if SCORE:
            b_score = tl.sum(b_sum * b_sum, 1)
            b_score = tl.where(b_score == b_score, b_score, float("inf"))
        else:
            b_score = tl.zeros([p_x.shape[0]], tl.float32)
    else:
        b_sum = tl.zeros([p_x.shape[0], DP], tl.float32)
        b_score = tl.zeros([p_x.shape[0]], tl.float32)
        if p_position is not None:
            b_position = tl.load(p_position + (i_window + 1) * (P**LEVEL) - 1)
        for c in tl.range(P, loop_unroll_factor=P if P**LEVEL <= 16 else 1):
            b_child, b_child_score = pool_window(
                p_x,
                p_mean,
                p_score,
                p_position,
                m_row,
                m_group,
                i_window * P + c,
                n,
                x_stride,
                mean_stride,
                LEVEL - 1,
                P,
                D,
                DP,
                GP,
                MEAN,
                SCORE,
            )
            if p_position is not None:
                is_own = (P - 1 - c) * (P ** (LEVEL - 1)) <= b_position
                b_child = tl.where(is_own, b_child, 0.0)
                b_child_score = tl.where(is_own, b_child_score, 0.0)
            b_sum += b_child
            b_score = tl.maximum(b_score, b_child_score)
        i_entry = level_offset(n, LEVEL, P) - n + i_window
        if MEAN:
            if p_position is None:
                b_mean = b_sum * (1.0 / (P**LEVEL))
            else:
                b_mean = b_sum * part_of_window(b_position, P**LEVEL)
            b_mean = b_mean.to(p_mean.dtype.element_ty)
            p_row = p_mean + i_entry.to(tl.int64) * mean_stride
            tl.store(p_row, b_mean, mask=row_mask(m_row, D, DP))
        if SCORE:
            if GP == 1:
                tl.store(p_score + i_entry, b_score, mask=m_group)
            else:
                b_group = tl.max(tl.reshape(b_score, [p_x.shape[0] // GP, GP]), 1)
                tl.store(p_score + i_entry, b_group, mask=m_group)
    return b_sum, b_score


@triton.jit
def pool_heads(
    x,
    mean,
    score,
    positions,
    i_block,
    n,
    x_stride_b,
    x_stride_t,
    x_stride_h,
    HK: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    UNIT: tl.constexpr,
    MEAN: tl.constexpr,
    SCORE: tl.constexpr,
):
    """Pool one coarsest window of R padded heads: R / GP groups of G."""
    i_window, i_b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    pooled = level_offset(n, L, P) - n
    i_row = tl.arange(0, R)
    i_group = i_block * (R // GP) + i_row // GP
    i_head = i_group * G + i_row % GP
    m_row = (i_group < HK) & (i_row % GP < G)
    i_kv = i_block * (R // GP) + tl.arange(0, R // GP)
    o_d = tl.arange(0, DP)[None, :]
    p_x = x + i_b * (x_stride_b * UNIT) + i_head[:, None] * (x_stride_h * UNIT) + o_d
    p_mean = mean + i_b * pooled * (HK * G * D) + (i_head * D)[:, None] + o_d
    p_score = score + (i_b * HK + i_kv) * pooled
    p_position = positions
    if positions is not None:
        p_position = positions + i_b * n
    pool_window(
        p_x,
        p_mean,
        p_score,
        p_position,
        m_row,
        i_kv < HK,
        i_window,
        n,
        x_stride_t * UNIT,
        HK * G * D,
        L - 1,
        P,
        D,
        DP,
        GP,
        MEAN,
        SCORE,
    )


STRIDES = [f"{x}_stride_{axis}" for x in "qkv" for axis in "bth"]


@kernel
@triton.jit(do_not_specialize=STRIDES)
def pool_kernel(
    q,
    k,
    v,
    pq,
    pk,
    pv,
    sq,
    sk,
    positions,
    n,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    HK: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    R: tl.constexpr,
    RQ: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    UNIT: tl.constexpr,
    MEAN: tl.constexpr,
    SCORE: tl.constexpr,
):
    """Pool and score. Grid: (coarsest windows, head blocks of q, then k, then v, batch)."""
    i_block = tl.program_id(1)
    q_blocks: tl.constexpr = (HK * GP + RQ - 1) // RQ
    kv_blocks: tl.constexpr = (HK + R - 1) // R
    if i_block < q_blocks:
        pool_heads(
            q, pq, sq, positions, i_block, n, q_stride_b, q_stride_t, q_stride_h,
            HK, G, GP, RQ, L, P, D, DP, UNIT, MEAN, SCORE,
        )  # fmt: skip
    elif i_block < q_blocks + kv_blocks:
        pool_heads(
            k, pk, sk, positions, i_block - q_blocks, n, k_stride_b, k_stride_t, k_stride_h,
            HK, 1, 1, R, L, P, D, DP, UNIT, MEAN, SCORE,
        )  # fmt: skip
    else:
        pool_heads(
            v, pv, sk, positions, i_block - q_blocks - kv_blocks, n, v_stride_b, v_stride_t,
            v_stride_h, HK, 1, 1, R, L, P, D, DP, UNIT, MEAN, False,
        )  # fmt: skip


def evenly_loadable(x: Tensor) -> Tensor:
    """Return `x`, or a copy if its strides or address would change how wide rows are loaded."""
    unit = stride_unit(x)
    even = x.stride(-1) == 1 and all(stride % unit == 0 for stride in x.stride()[:-1])
    if even and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def stride_unit(x: Tensor) -> int:
    return STRIDE_UNIT if x.shape[-1] % STRIDE_UNIT == 0 else 1


def _launch(
    tokens: QKV, into: Pooled, geom: Geometry, with_means: bool, positions: Tensor | None
) -> None:
    """Launch over q, k and v where means are wanted, else over q and k alone."""
    q, k, v = (evenly_loadable(x) for x in tokens)
    batch, _, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    rows, padded = row_tile(head_dim, TILE)
    groups = num_heads // num_kv_heads
    padded_groups = next_power_of_2(groups)
    q_rows = max(rows, padded_groups)
    q_blocks = ceil_div(num_kv_heads * padded_groups, q_rows)
    kv_blocks = ceil_div(num_kv_heads, rows)
    unit = stride_unit(q)
    strides = [stride // unit for x in (q, k, v) for stride in x.stride()[:3]]
    blocks = q_blocks + (2 if with_means else 1) * kv_blocks
    grid = (geom.level_size(geom.num_levels - 1), blocks, batch)
    pool_kernel.launch(
        grid,
        (
            q,
            k,
            v,
            *into.means,
            into.sq,
            into.sk,
            contiguous(positions),
            geom.num_tokens,
            *strides,
        ),
        num_warps=NUM_WARPS,
        HK=num_kv_heads,
        G=groups,
        GP=padded_groups,
        R=rows,
        RQ=q_rows,
        L=geom.num_levels,
        P=geom.pool_factor,
        D=head_dim,
        DP=padded,
        UNIT=unit,
        MEAN=with_means,
        SCORE=into.sq.numel() > 0,
    )


def _empty_scores(x: Tensor, num_kv_heads: int, geom: Geometry) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], num_kv_heads, geom.pooled_size)
    sq = torch.empty(shape, dtype=torch.float32, device=x.device)
    return sq, torch.empty_like(sq)


def pool_and_score(
    tokens: QKV, geom: Geometry, with_scores: bool = True, positions: Tensor | None = None
) -> Pooled:
    """Pool q, k, v into levels 1 to L-1 and score them by squared norms.

    Args:
        tokens: q [B, n, H, D], k and v [B, n, Hk, D].
        positions: [B, n] int32 inside documents; means and scores are then of those tokens of a
            window that are in its last one's.

    Returns:
        means of q [B, pooled_size, H, D], of k and v [B, pooled_size, Hk, D], level 1 first, summed
        in fp32, rounded once; sq, sk [B, Hk, pooled_size] fp32, or empty ones of shape [0].
    """
    means = QKV(*(empty_like_rows(x, geom.pooled_size) for x in tokens))
    if with_scores:
        scores = _empty_scores(tokens.q, tokens.k.shape[2], geom)
    else:
        sq, sk = (torch.empty(0, dtype=torch.float32, device=tokens.q.device) for _ in "qk")
        scores = sq, sk
    into = Pooled(means, *scores)
    _launch(tokens, into, geom, True, positions)
    return into


def score_tensors(
    score_q: Tensor, score_k: Tensor, geom: Geometry, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Score levels 1 to L-1 by the squared norms of score_q [B, n, H, E], score_k [B, n, Hk, E].

    Returns:
        sq, sk [B, Hk, pooled_size] fp32.
    """
    scores = _empty_scores(score_q, score_k.shape[2], geom)
    # No means: the third tensor and the outputs of the first three are never touched.
    unused = QKV(score_q, score_k, score_k)
    _launch(unused, Pooled(unused, *scores), geom, False, positions)
    return scores
