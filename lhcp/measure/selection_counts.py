"""What `diagnose` counts on one rank: integers and sums that add up over ranks."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lhcp.comm.layout import Layout
from lhcp.layer.select import ScoredSelection
from lhcp.lighthouse.documents import of_last_tokens
from lhcp.lighthouse.geometry import Geometry

NEAR = 1e-3
"""Relative distance to the best not picked within which a pick is a near-tie."""


@dataclass(frozen=True)
class Counts:
    """Sums over entries, float64; of the whole sequence once all ranks' are added up.

    Levels are 1 to L-1 in order. Scores that are not finite are counted apart.
    """

    moments: Tensor
    """[2, L-1, Hk, 3]: of sq, then sk: the number of scores, their sum and the sum of squares."""
    not_finite: Tensor
    """[2]: scores of q, then of k, that are not finite."""
    picks: Tensor
    """[L-1, C, Hk]: entries that each stratum of the whole sequence takes."""
    parents: Tensor
    """[L-1, C, Hk]: those of them whose children hold at least one pick; zero at level 1."""
    shared: Tensor
    """[B, L-1, Hk, Hk]: entries that both heads take."""
    near: Tensor
    """[L-1, 2]: picks that are near-ties, and picks in all, the forced entries in neither."""

    def packed(self) -> Tensor:
        """Return all of it as one vector."""
        return torch.cat([getattr(self, f.name).flatten() for f in fields(self)])

    def unpacked(self, vector: Tensor) -> "Counts":
        """Return the counts that `packed` made `vector` of, with the sizes of these."""
        like = [getattr(self, f.name) for f in fields(self)]
        parts = vector.split([x.numel() for x in like])
        return Counts(*(part.view(x.shape) for part, x in zip(parts, like, strict=True)))


def count(scored: ScoredSelection, layout: Layout, rank: int) -> Counts:
    """Count what this rank selected; no communication, no gradient."""
    geom = scored.geometry
    levels = range(1, geom.num_levels)
    strata = global_strata(geom, layout, rank).to(scored.sq.device)
    masks = [taken_at(scored, level) for level in levels]
    batch, heads = scored.sq.shape[:2]

    def spread_out(local: Tensor) -> Tensor:
        """Put [B, Hk, C / W] counts of local strata at their places: [C, Hk], summed over B."""
        whole = local.new_zeros(geom.num_strata * layout.world_size, heads)
        return whole.index_copy(0, strata, local.sum(0).T)

    def with_picks(index: int) -> Tensor:
        if index == 0:
            return torch.zeros_like(masks[0])
        return masks[index] & masks[index - 1].unflatten(2, (-1, geom.pool_factor)).any(3)

    def by_stratum(mask: Tensor) -> Tensor:
        return spread_out(mask.unflatten(2, (geom.num_strata, -1)).sum(3).double())

    wide = [mask.double() for mask in masks]
    per_level = [near_ties(scored, level, masks[level - 1]) for level in levels]
    finite = [torch.stack(_moments(score, geom)) for score in (scored.sq, scored.sk)]
    lost = [(~score.isfinite()).sum().double() for score in (scored.sq, scored.sk)]
    counts = Counts(
        moments=torch.stack(finite),
        not_finite=torch.stack(lost),
        picks=torch.stack([by_stratum(mask) for mask in masks]),
        parents=torch.stack([by_stratum(with_picks(i)) for i in range(len(masks))]),
        shared=torch.stack([x @ x.transpose(1, 2) for x in wide], 1),
        near=torch.stack(per_level),
    )
    assert counts.shared.shape == (batch, len(masks), heads, heads)
    return counts


def global_strata(geom: Geometry, layout: Layout, rank: int) -> Tensor:
    """Return which strata of the whole sequence this rank's are: int64 [C / W]."""
    per_chunk = geom.num_strata // geom.num_chunks
    starts = torch.tensor([chunk * per_chunk for chunk in layout.chunks(rank)], device="cpu")
    return (starts[:, None] + torch.arange(per_chunk, device="cpu")).flatten()


def _level(score: Tensor, geom: Geometry, level: int) -> Tensor:
    """Return the scores [B, Hk, level_size] of one level."""
    start = geom.offset(level) - geom.num_tokens
    return score[:, :, start : start + geom.level_size(level)]


def _moments(score: Tensor, geom: Geometry) -> list[Tensor]:
    """Return [Hk, 3] for each level: number, sum and sum of squares of the finite scores."""
    found = []
    for level in range(1, geom.num_levels):
        x = _level(score, geom, level).double()
        finite = x.isfinite()
        x = x.where(finite, 0)
        sums = [part.sum((0, 2)) for part in (finite.double(), x, x.square())]
        found.append(torch.stack(sums, 1))
    return found


def taken_at(scored: ScoredSelection, level: int) -> Tensor:
    """Return which entries of `level` are taken, their children in: bool [B, Hk, level_size]."""
    geom, rows = scored.geometry, scored.selection.row_of_entry
    below = slice(geom.offset(level - 1), geom.offset(level))
    return rows[:, :, below].unflatten(2, (-1, geom.pool_factor))[..., 0] >= 0


def forced_at(scored: ScoredSelection, level: int) -> Tensor:
    """Return which entries of `level` are taken whatever their scores: bool [B or 1, 1, size]."""
    geom = scored.geometry
    if scored.positions is not None:
        last = of_last_tokens(scored.positions, level, geom)
        return (last < geom.window(level))[:, None]
    forced = torch.zeros(1, 1, geom.level_size(level), dtype=torch.bool, device=scored.sq.device)
    forced[..., 0] = geom.has_first
    return forced


def near_ties(scored: ScoredSelection, level: int, taken: Tensor) -> Tensor:
    """Return float64 [2]: picks of `level` that are near-ties, and all that scores decided.

    Of the half that the query scores take, the best not picked is the best query score that it
    leaves; of the key scores' half, the best key score that neither half took.
    """
    geom = scored.geometry
    here = slice(geom.offset(level), geom.offset(level + 1))
    candidate = scored.selection.row_of_entry[:, :, here] >= 0

    def stratum(x: Tensor) -> Tensor:
        return x.unflatten(2, (geom.num_strata, -1))

    # Scores are not negative, so that -1 ranks what is no candidate last.
    sq, sk = (stratum(_level(s, geom, level).where(candidate, -1)) for s in (scored.sq, scored.sk))
    taken, half = stratum(taken), geom.picks // 2
    forced = stratum(forced_at(scored, level).expand_as(candidate))
    # In the order of their indices, before infinite scores.
    ranked = sq.masked_fill(~sq.isfinite(), torch.finfo(sq.dtype).max)
    ranked = ranked.masked_fill(forced, torch.inf)
    by_query = ranked.argsort(dim=3, descending=True, stable=True)[..., :half]
    first = torch.zeros_like(taken).scatter_(3, by_query, True)
    second = taken & ~first
    query_left = sq.masked_fill(first, -1).amax(3, keepdim=True)
    key_left = sk.masked_fill(taken, -1).amax(3, keepdim=True)
    first, second = first & ~forced, second & ~forced
    near = (first & (sq <= query_left * (1 + NEAR))) | (second & (sk <= key_left * (1 + NEAR)))
    return torch.stack([near.sum(), (first | second).sum()]).double()
