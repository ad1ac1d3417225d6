"""Which numbers of strata, picks and tokens fit one another: what `LighthouseConfig` advises.

Pure integers, by the rules that lhcp/config.py states and checks.
"""

from math import log


def nearest_multiples(value: int, unit: int) -> str:
    """Return the positive multiples of `unit` around `value`, as text for an error message."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below > 0 else f"{unit}"


def nearest_multiple(value: int, unit: int) -> int:
    """Return the positive multiple of `unit` that is nearest to `value`."""
    return max((value + unit // 2) // unit, 1) * unit


def fitting_strata(
    seqlen: int, num_chunks: int, window: int, num_strata: int, topk: int
) -> tuple[int, int, int]:
    """Return (num_strata, topk, length): those nearest to what is wished that fit one another.

    `length` is the least of at least `seqlen` tokens that cuts into `num_chunks` chunks of whole
    coarsest windows, two a chunk at least: one to take by queries and one by keys.

    Args:
        seqlen: tokens of the whole sequence; any number.
        num_chunks: chunks of all ranks; the strata are a multiple of it.
        window: tokens under one coarsest entry.
        num_strata, topk: what is wished.
    """
    entries_per_chunk = max(-(-seqlen // (num_chunks * window)), 2)
    entries = entries_per_chunk * num_chunks
    divisors = [n for n in range(1, entries_per_chunk // 2 + 1) if entries_per_chunk % n == 0]
    strata = min(divisors, key=lambda n: abs(log(n * num_chunks / num_strata))) * num_chunks
    unit = 2 * strata
    return strata, min(nearest_multiple(topk, unit), entries // unit * unit), entries * window


def shortening_topk(topk: int, unit: int, entries: int, window: int, branches: int) -> int:
    """Return the largest multiple of `unit` up to `topk` that makes S < N, or `unit` if none does.

    Args:
        entries: of the coarsest level; window: tokens under one; N = entries * window.
        branches: entries of the sub-sequence for each that is taken: (L - 1) p.
    """
    most = (entries * window - entries - 1) // branches
    return max(min(topk, most // unit * unit), unit)


def block_fits(stratum: int, scorer_window: int, dilation: int) -> bool:
    """Return whether blocks of the dilated scorer cut a stratum, and its residues cut a block."""
    window = min(scorer_window, stratum)
    return stratum % window == 0 and window % dilation == 0


def fitting_block(stratum: int, scorer_window: int, dilation: int) -> tuple[int, int]:
    """Return the largest scorer_window up to the present one that fits, and its dilation."""
    for window in range(min(scorer_window, stratum), 0, -1):
        if stratum % window == 0 and window % dilation == 0:
            return window, dilation
    return stratum, max(d for d in range(1, dilation) if stratum % d == 0)
