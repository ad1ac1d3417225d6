"""The selection: which entries enter the sub-sequence and in which order. No gradient."""

from typing import NamedTuple

import torch
from torch import Tensor

from lhcp.lighthouse.documents import begin_documents
from lhcp.lighthouse.geometry import Geometry


class Selection(NamedTuple):
    """One rank's sub-sequence, for each batch row and kv head. Inverse maps of each other.

    Selection looks ahead inside its stratum (as in the paper): which entries are in may depend on
    later tokens; for a fixed selection, attention is causal.
    """

    entries: Tensor
    """[B, Hk, S / W] int32: the pyramid id of the entry in each row, in post-order."""
    row_of_entry: Tensor
    """[B, Hk, pyramid_size] int32: the row of each entry of the local pyramid, or -1."""

    @property
    def subsequence(self) -> int:
        """S / W, the entries of this rank."""
        return self.entries.shape[-1]

    def levels(self, geom: Geometry) -> Tensor:
        """Return the level of each row: [B, Hk, S / W] int64."""
        bounds = [geom.offset(level) for level in range(1, geom.num_levels)]
        edges = torch.tensor(bounds, device=self.entries.device)
        return torch.bucketize(self.entries.long(), edges, right=True)

    def indices(self, geom: Geometry) -> Tensor:
        """Return the index in its level, on this rank, of the entry in each row: as `levels`."""
        offsets = [geom.offset(level) for level in range(geom.num_levels)]
        offsets_of = torch.tensor(offsets, device=self.entries.device)
        return self.entries.long() - offsets_of[self.levels(geom)]


def select(sq: Tensor, sk: Tensor, geom: Geometry, positions: Tensor | None = None) -> Selection:
    """Pick entries stratum by stratum and put them in post-order.

    From the coarsest level down to 1, each stratum takes m/2 of its candidates by `sq`, then m/2 of
    the rest by `sk`, ties to the lower index; the children of the taken are the next candidates.
    Every candidate of every level is in the sub-sequence. Before all scores come the entries whose
    windows hold a document's first token: of one document, the first of the sequence.

    Args:
        sq, sk: [B, Hk, pooled_size], scores of levels 1 to L-1, level 1 first. NaN ranks as +inf.
        positions: [B, n] inside documents, of which at most `geom.picks` windows of level 1 of a
            stratum hold a first token; None: one document.

    Returns:
        Selection of `geom.subsequence` entries.
    """
    p = geom.pool_factor
    batch, heads, _ = sq.shape
    candidates = torch.arange(geom.num_candidates(geom.num_levels - 1), device=sq.device)
    candidates = candidates.expand(batch, heads, geom.num_strata, -1)
    first = None if positions is None else begin_documents(positions, geom)[:, None]
    ids, keys = [], []
    for level in range(geom.num_levels - 1, -1, -1):
        per_stratum = geom.stratum_size // geom.window(level)
        strata = torch.arange(geom.num_strata, device=sq.device)[:, None] * per_stratum
        ids.append(candidates + strata + geom.offset(level))
        # The last token covered, then the level: exact integers at any length.
        keys.append(((candidates + 1) * geom.window(level) - 1) * geom.num_levels + level)
        if level > 0:
            start = geom.offset(level) - geom.num_tokens
            columns = slice(start, start + geom.level_size(level))
            level_q, level_k = (
                score[:, :, columns].unflatten(2, (geom.num_strata, -1)).gather(3, candidates)
                for score in (sq, sk)
            )
            forced = None
            if first is not None:
                forced = first[:, :, columns].unflatten(2, (geom.num_strata, -1))
                forced = forced.expand(-1, heads, -1, -1).gather(3, candidates)
            elif geom.has_first:
                level_q = level_q.clone()
                level_q[:, :, 0, 0] = torch.inf
            taken = _take(candidates, (level_q, level_k), forced, geom.picks)
            children = torch.arange(p, device=sq.device)
            candidates = (taken[..., None] * p + children).flatten(3)
    order = torch.cat(keys, 3).argsort(3)
    entries = torch.cat(ids, 3).gather(3, order).flatten(2)
    row_of_entry = entries.new_full((batch, heads, geom.pyramid_size), -1)
    rows = torch.arange(geom.subsequence, device=sq.device)
    row_of_entry.scatter_(2, entries, rows.expand_as(entries))
    return Selection(entries.int(), row_of_entry.int())


def _take(
    candidates: Tensor, scores: tuple[Tensor, Tensor], forced: Tensor | None, picks: int
) -> Tensor:
    """Take picks/2 by sq, then picks/2 of the rest by sk; ascending indices [..., picks].

    The forced come before the others, and in the order of their indices.
    """
    sq, sk = scores
    order = _descending(sq)
    if forced is not None:
        order = _descending(sq.masked_fill(forced, torch.inf))
        order = _stably(order, ~forced)
    by_query = order[..., : picks // 2]
    taken = torch.zeros_like(sq, dtype=torch.bool).scatter_(3, by_query, True)
    # A taken candidate must rank below every other, whatever its score: two stable sorts.
    if forced is None:
        order = _stably(_descending(sk), taken)
    else:
        order = _descending(sk.masked_fill(forced, torch.inf))
        order = _stably(order, 1 + taken.to(torch.int8) - (forced & ~taken).to(torch.int8))
    by_key = order[..., : picks // 2]
    taken_at = torch.cat([by_query, by_key], 3).sort(3).values
    return candidates.gather(3, taken_at)


def _stably(order: Tensor, group: Tensor) -> Tensor:
    """Put candidates that are in order by their groups, lower ones first."""
    return order.gather(3, group.gather(3, order).to(torch.int8).argsort(dim=3, stable=True))


def _descending(score: Tensor) -> Tensor:
    score = score.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return score.argsort(dim=3, descending=True, stable=True)
