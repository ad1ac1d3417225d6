"""The selection cascade of a stratum, and the places that follow from it by prefix sums."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lhcp.kernel_launch import ceil_div, kernel, next_power_of_2
from lhcp.lighthouse.geometry import Geometry
from lhcp.lighthouse.kernels.primitives import contiguous, level_offset

EXCLUDED = tl.constexpr(-(2**31))
FORCED = tl.constexpr(2**31 - 1)

MAX_BLOCK = 8192
"""Candidates that one program keeps in registers during a search; it loops over more."""
KEYS_PER_WARP = 256
PLACE_BLOCK, PLACE_WARPS = 1024, 4


@triton.jit
def ordered_bits(b_score):
    """Map fp32 to int32 in the same order: NaN as +inf, -0 as 0. Never EXCLUDED or FORCED."""
    b_score = tl.where(b_score == b_score, b_score, float("inf"))
    b_bits = tl.where(b_score == 0.0, 0.0, b_score).to(tl.int32, bitcast=True)
    return b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)


@triton.jit
def find_threshold(p_key, size, count, BLOCK: tl.constexpr, SINGLE: tl.constexpr):
    """Find the count-th largest of p_key[:size], bit by bit from the highest.

    Example: keys 5, 3, 3, 1 and count 2: returns (3, 1), one of those equal to 3 is taken.

    Returns:
        the key, and how many of those equal to it are among the `count` largest.
    """
    o_key = tl.arange(0, BLOCK)
    b_key = tl.load(p_key + o_key, mask=o_key < size, other=EXCLUDED)
    threshold = tl.full([], EXCLUDED, tl.int32)
    for i in range(32):
        higher = threshold ^ (tl.full([], 1, tl.int32) << (31 - i))
        reached = tl.sum((b_key >= higher).to(tl.int32), 0)
        if not SINGLE:
            for start in range(BLOCK, size, BLOCK):
                m_key = start + o_key < size
                b_more = tl.load(p_key + start + o_key, mask=m_key, other=EXCLUDED)
                reached += tl.sum((b_more >= higher).to(tl.int32), 0)
        threshold = tl.where(reached >= count, higher, threshold)
    above = tl.sum((b_key > threshold).to(tl.int32), 0)
    if not SINGLE:
        for start in range(BLOCK, size, BLOCK):
            m_key = start + o_key < size
            b_more = tl.load(p_key + start + o_key, mask=m_key, other=EXCLUDED)
            above += tl.sum((b_more > threshold).to(tl.int32), 0)
    return threshold, count - above


@triton.jit
def take_largest(b_key, threshold, num_equal, equal_before):
    """Return the mask of the keys above the threshold, and of the first num_equal equal to it."""
    b_equal = (b_key == threshold).to(tl.int32)
    b_before = equal_before + tl.cumsum(b_equal, 0) - b_equal
    m_taken = (b_key > threshold) | ((b_equal > 0) & (b_before < num_equal))
    return m_taken, equal_before + tl.sum(b_equal, 0)


@triton.jit
def candidate_index(p_parent, o_key, mask, P: tl.constexpr, COARSEST: tl.constexpr):
    """Return each candidate's index in the stratum: all, or the children of the parents taken."""
    if COARSEST:
        return o_key
    return tl.load(p_parent + o_key // P, mask=mask, other=0) * P + o_key % P


@triton.jit
def take_level(
    p_sq,
    p_sk,
    p_ranks,
    p_parent,
    p_taken,
    p_key_q,
    p_key_k,
    p_position,
    size,
    picks,
    is_first,
    WINDOW: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    SINGLE: tl.constexpr,
    COARSEST: tl.constexpr,
):
    """Take picks / 2 of `size` candidates by sq and as many of the rest by sk.

    Writes p_ranks[j] = 2 * (taken before j) + (j is taken) for all candidates j and for j = size,
    and p_taken, the indices of the taken in ascending order.

    p_position: to the position of the stratum's first token inside its document, or None. The
    entries whose WINDOW holds a document's first token are then taken before all scores.
    """
    o_block = tl.arange(0, BLOCK)
    for start in range(0, size, BLOCK):
        o_key = start + o_block
        m_key = o_key < size
        b_index = candidate_index(p_parent, o_key, m_key, P, COARSEST)
        b_key_q = ordered_bits(tl.load(p_sq + b_index, mask=m_key, other=0.0))
        b_key_k = ordered_bits(tl.load(p_sk + b_index, mask=m_key, other=0.0))
        if p_position is None:
            b_key_q = tl.where((b_index == 0) & is_first, FORCED, b_key_q)
        else:
            p_last = p_position + (b_index + 1) * WINDOW - 1
            b_forced = tl.load(p_last, mask=m_key, other=WINDOW) < WINDOW
            b_key_q = tl.where(b_forced, FORCED, b_key_q)
            b_key_k = tl.where(b_forced, FORCED, b_key_k)
        tl.store(p_key_q + o_key, b_key_q, mask=m_key)
        tl.store(p_key_k + o_key, b_key_k, mask=m_key)
    tl.debug_barrier()

    threshold, num_equal = find_threshold(p_key_q, size, picks // 2, BLOCK, SINGLE)
    equal_before = 0
    for start in range(0, size, BLOCK):
        o_key = start + o_block
        m_key = o_key < size
        b_key = tl.load(p_key_q + o_key, mask=m_key, other=EXCLUDED)
        m_taken, equal_before = take_largest(b_key, threshold, num_equal, equal_before)
        b_excluded = tl.full([BLOCK], EXCLUDED, tl.int32)
        tl.store(p_key_k + o_key, b_excluded, mask=m_taken & m_key)
    tl.debug_barrier()

    threshold, num_equal = find_threshold(p_key_k, size, picks // 2, BLOCK, SINGLE)
    equal_before = 0
    taken_before = 0
    for start in range(0, size, BLOCK):
        o_key = start + o_block
        m_key = o_key < size
        b_key = tl.load(p_key_k + o_key, mask=m_key, other=EXCLUDED)
        m_taken, equal_before = take_largest(b_key, threshold, num_equal, equal_before)
        m_taken = (m_taken | (b_key == EXCLUDED)) & m_key
        b_taken = m_taken.to(tl.int32)
        b_rank = taken_before + tl.cumsum(b_taken, 0) - b_taken
        taken_before += tl.sum(b_taken, 0)
        b_index = candidate_index(p_parent, o_key, m_key, P, COARSEST)
        tl.store(p_ranks + o_key, b_rank * 2 + b_taken, mask=m_key)
        tl.store(p_taken + b_rank, b_index, mask=m_taken)
    tl.store(p_ranks + size, picks * 2)
    tl.debug_barrier()


@kernel
@triton.jit
def cascade_kernel(
    sq,
    sk,
    positions,
    ranks,
    scratch,
    n,
    num_kv_heads,
    num_strata,
    picks,
    coarsest,
    ranks_stride,
    scratch_stride,
    L: tl.constexpr,
    P: tl.constexpr,
    BLOCK_COARSEST: tl.constexpr,
    SINGLE_COARSEST: tl.constexpr,
    BLOCK: tl.constexpr,
    SINGLE: tl.constexpr,
    HAS_FIRST: tl.constexpr,
):
    """Run the cascade of one stratum of one kv head. Grid: (strata, kv heads of all batches).

    ranks: [heads, strata, ranks_stride], take_level's ranks, coarsest level first. scratch:
    [heads, strata, scratch_stride]: two lists of the taken, used in turn, and the keys.
    """
    i_stratum, i_head = tl.program_id(0) % num_strata, (tl.program_id(0) // num_strata).to(tl.int64)
    is_first = (i_stratum == 0) & HAS_FIRST
    pooled = level_offset(n, L, P) - n
    i_program = i_head * num_strata + i_stratum
    p_ranks = ranks + i_program * ranks_stride
    p_lists = scratch + i_program * scratch_stride
    p_keys = p_lists + 2 * picks
    keys = tl.maximum(coarsest, picks * P)
    p_position = positions
    if positions is not None:
        i_token = i_stratum * coarsest * (P ** (L - 1))
        p_position = positions + i_head // num_kv_heads * n + i_token
    for i in tl.static_range(L - 1):
        # Level L-1-i; the lists alternate, so a level never overwrites the one it reads.
        i_entry = level_offset(n, L - 1 - i, P) - n + i_stratum * coarsest * (P**i)
        p_sq = sq + i_head * pooled + i_entry
        p_sk = sk + i_head * pooled + i_entry
        p_taken = p_lists + (i % 2) * picks
        p_parent = p_lists + ((i + 1) % 2) * picks
        if i == 0:
            take_level(
                p_sq, p_sk, p_ranks, p_parent, p_taken, p_keys, p_keys + keys, p_position, coarsest,
                picks, is_first, P ** (L - 1), P, BLOCK_COARSEST, SINGLE_COARSEST, True,
            )  # fmt: skip
            p_ranks += coarsest + 1
        else:
            take_level(
                p_sq, p_sk, p_ranks, p_parent, p_taken, p_keys, p_keys + keys, p_position,
                picks * P, picks, is_first, P ** (L - 1 - i), P, BLOCK, SINGLE, False,
            )  # fmt: skip
            p_ranks += picks * P + 1


@triton.jit
def place_tile(
    p_ranks,
    p_entries,
    p_places,
    i_tile,
    n,
    picks,
    coarsest,
    ranks_stride,
    stratum_places,
    LEVEL: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find the rows of BLOCK entries of LEVEL, walking down from their coarsest ancestors.

    Before an entry come the entries of its own level before it in the list of candidates; of each
    coarser level those before its ancestor; of each finer level the children of all that is taken
    up to and including it.

    Example: P = 2, L = 2, entries 0, 1, 2 of level 1 of which 1 is taken: ranks 0, 1, 2, 2 (rank 0,
    rank 0 and taken, rank 1, and the end). Entry 1 of level 1 has 1 + 2 * (0 + 1) = 3 before it;
    entry 3 of level 0, its second child, 1 + (0 * 2 + 1) = 2.
    """
    DEPTH: tl.constexpr = L - 1 - LEVEL
    i_entry = i_tile * BLOCK + tl.arange(0, BLOCK)
    m_level = i_entry < n // (P**LEVEL)
    i_stratum = i_entry // (coarsest * (P**DEPTH))
    i_local = i_entry - i_stratum * (coarsest * (P**DEPTH))
    p_list = p_ranks + i_stratum.to(tl.int64) * ranks_stride
    b_rank = i_local // (P**DEPTH)
    b_place = i_stratum * stratum_places
    m_in = m_level
    for i in tl.static_range(DEPTH):
        b_list = tl.load(p_list + b_rank, mask=m_in, other=0)
        m_in = m_in & ((b_list & 1) == 1)
        b_place += b_rank
        b_rank = (b_list >> 1) * P + (i_local // (P ** (DEPTH - 1 - i))) % P
        p_list += (coarsest if i == 0 else picks * P) + 1
    b_place += b_rank
    if LEVEL > 0:
        b_list = tl.load(p_list + b_rank, mask=m_in, other=0)
        b_below = ((b_list >> 1) + (b_list & 1)) * P
        b_place += b_below
        for i in tl.static_range(LEVEL - 1):
            p_list += (coarsest if DEPTH + i == 0 else picks * P) + 1
            b_below = (tl.load(p_list + b_below, mask=m_in, other=0) >> 1) * P
            b_place += b_below
    offset = level_offset(n, LEVEL, P)
    tl.store(p_places + offset + i_entry, tl.where(m_in, b_place, -1), mask=m_level)
    tl.store(p_entries + b_place, offset + i_entry, mask=m_in)


@kernel
@triton.jit
def place_kernel(
    ranks,
    entries,
    row_of_entry,
    n,
    num_strata,
    picks,
    coarsest,
    ranks_stride,
    stratum_places,
    num_tiles,
    L: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write both maps. Grid: tiles of level 0, then of level 1, ..., for each kv head."""
    i_tile, i_head = tl.program_id(0) % num_tiles, (tl.program_id(0) // num_tiles).to(tl.int64)
    p_ranks = ranks + i_head * num_strata * ranks_stride
    p_entries = entries + i_head * num_strata * stratum_places
    p_places = row_of_entry + i_head * level_offset(n, L, P)
    for level in tl.static_range(L):
        level_tiles = tl.cdiv(n // (P**level), BLOCK)
        if (i_tile >= 0) & (i_tile < level_tiles):
            place_tile(
                p_ranks, p_entries, p_places, i_tile, n, picks, coarsest, ranks_stride,
                stratum_places, level, L, P, BLOCK,
            )  # fmt: skip
        i_tile -= level_tiles


def select(
    sq: Tensor,
    sk: Tensor,
    geom: Geometry,
    positions: Tensor | None = None,
    max_block: int = MAX_BLOCK,
) -> tuple[Tensor, Tensor]:
    """Run the cascade in each local stratum and put what is in into post-order.

    Args:
        sq, sk: [B, Hk, pooled_size] fp32, scores of levels 1 to L-1, level 1 first.
        positions: [B, n] int32 inside documents; None: one document.

    Returns:
        entries [B, Hk, S] int32 and row_of_entry [B, Hk, pyramid_size] int32, see `Selection`.
    """
    batch, num_kv_heads, _ = sq.shape
    sq, sk = sq.contiguous(), sk.contiguous()
    num_levels, p, picks = geom.num_levels, geom.pool_factor, geom.picks
    coarsest = geom.num_candidates(num_levels - 1)
    finer = picks * p
    ranks_stride = coarsest + 1 + (num_levels - 2) * (finer + 1)
    scratch_stride = 2 * picks + 2 * max(coarsest, finer)
    rows = (batch, num_kv_heads)

    def empty(*shape: int) -> Tensor:
        return torch.empty((*rows, *shape), dtype=torch.int32, device=sq.device)

    ranks = empty(geom.num_strata, ranks_stride)
    scratch = empty(geom.num_strata, scratch_stride)
    entries, row_of_entry = empty(geom.subsequence), empty(geom.pyramid_size)
    block_coarsest = min(max_block, next_power_of_2(coarsest))
    block = min(max_block, next_power_of_2(finer))
    cascade_kernel.launch(
        (geom.num_strata * batch * num_kv_heads,),
        (
            sq,
            sk,
            contiguous(positions),
            ranks,
            scratch,
            geom.num_tokens,
            num_kv_heads,
            geom.num_strata,
            picks,
            coarsest,
            ranks_stride,
            scratch_stride,
        ),
        num_warps=max(1, min(16, max(block, block_coarsest) // KEYS_PER_WARP)),
        L=num_levels,
        P=p,
        BLOCK_COARSEST=block_coarsest,
        SINGLE_COARSEST=coarsest <= block_coarsest,
        BLOCK=block,
        SINGLE=finer <= block,
        HAS_FIRST=geom.has_first,
    )
    num_tiles = sum(ceil_div(geom.level_size(level), PLACE_BLOCK) for level in range(num_levels))
    place_kernel.launch(
        (num_tiles * batch * num_kv_heads,),
        (
            ranks,
            entries,
            row_of_entry,
            geom.num_tokens,
            geom.num_strata,
            picks,
            coarsest,
            ranks_stride,
            geom.stratum_subsequence,
            num_tiles,
        ),
        num_warps=PLACE_WARPS,
        L=num_levels,
        P=p,
        BLOCK=PLACE_BLOCK,
    )
    return entries, row_of_entry
