"""What packed documents change in the local stages: which tokens of a window are its entry's.

An entry belongs to the document of the last token that it covers. All is read off the *positions*
of tokens inside their documents, [B, n] (`lhcp.documents.Documents`): token s, not after t, is of
t's document where t - s <= position of t. Both ends of each test are inside one chunk, or one of
them is a chunk's last token and the other in the next chunk, so nothing here asks a neighbour.
"""

import torch
from torch import Tensor

from lhcp.lighthouse.geometry import Geometry
from lhcp.made_once import made_once


def of_last_tokens(x: Tensor, level: int, geom: Geometry) -> Tensor:
    """Read x [B, n, ...] at the last token of each entry of a level: [B, level_size, ...]."""
    window = geom.window(level)
    return x[:, window - 1 :: window]


def num_own(positions: Tensor, level: int, geom: Geometry) -> Tensor:
    """Count the tokens of each window that are in its entry's document: [B, level_size]."""
    return (of_last_tokens(positions, level, geom) + 1).clamp(max=geom.window(level))


def own_tokens(positions: Tensor, level: int, geom: Geometry) -> Tensor:
    """Return whether each token is in the document of its entry of a level: bool [B, n]."""
    window = geom.window(level)
    before_last = torch.arange(window - 1, -1, -1, device=positions.device)
    last = of_last_tokens(positions, level, geom)
    return (before_last <= last[..., None]).flatten(1)


def own_children(positions: Tensor, level: int, geom: Geometry) -> Tensor:
    """Return whether each child of each entry is in its document: bool [B, level_size, p].

    A child that is not has no token that is: documents ascend, and its last token is before them.
    """
    children = torch.arange(geom.pool_factor - 1, -1, -1, device=positions.device)
    last = of_last_tokens(positions, level, geom)
    return children * geom.window(level - 1) <= last[..., None]


def served(positions: Tensor, level: int, geom: Geometry) -> Tensor:
    """Return whether each token is in the document of the entry that serves it: bool [B, n].

    That entry ends at the token, or window - 1 tokens before it at most; for the first tokens of a
    chunk it is the last of the chunk before.
    """
    after_last = torch.arange(1, positions.shape[1] + 1, device=positions.device)
    return after_last % geom.window(level) <= positions


def begin_documents(positions: Tensor, geom: Geometry) -> Tensor:
    """Return whether a document's first token is in each window: bool [B, pooled_size]."""
    levels = range(1, geom.num_levels)
    return torch.cat(
        [of_last_tokens(positions, level, geom) < geom.window(level) for level in levels], 1
    )


def mean_of(sums: Tensor, level: int, geom: Geometry, positions: Tensor | None) -> Tensor:
    """Divide what belongs to the entries of a level, [B, level_size, heads, D], by their tokens."""
    means = sums / geom.window(level)
    if positions is None:
        return means
    count = num_own(positions, level, geom)[..., None, None]
    # A whole window's quotient has the same bits with documents and without.
    return means.where(count == geom.window(level), sums / count)


def numbers_of(entries: Tensor, numbers: Tensor, geom: Geometry) -> Tensor:
    """Return the documents of the rows of a sub-sequence.

    Args:
        entries: [B, Hk, S] pyramid ids. numbers: [B, n] int32 of the tokens.

    Returns:
        [B, Hk, S] int32, ascending along the sequence, for entries are in the order of their last
        tokens.
    """
    levels = range(geom.num_levels)
    pyramid = made_once(
        numbers,
        ("pyramid", geom),
        lambda: torch.cat([of_last_tokens(numbers, i, geom) for i in levels], 1),
    )
    return pyramid[:, None].expand(-1, entries.shape[1], -1).gather(2, entries.long())


def entry_limits(limits: Tensor, geom: Geometry) -> Tensor:
    """Return `Documents.limits` for the rows of a sub-sequence, int64 [3] on the CPU.

    A document has no entries in a chunk where it has no tokens, and of each level at most one for
    each of its tokens: of all levels together at most twice as many, and one a level.
    """

    def of_entries() -> Tensor:
        documents, longest, reach = limits.unbind()
        return torch.stack([documents, 2 * longest + geom.num_levels, reach])

    return made_once(limits, ("entries", geom), of_entries)
