"""What `diagnose` returns: whether a selection is alive, in numbers, as a table and in words."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from torch import Tensor

from lhcp.layer.spread import CONSTANT
from lhcp.measure.selection_counts import NEAR, Counts

SAME = 0.99
"""Overlap from which heads count as selecting the same."""


@dataclass(frozen=True, kw_only=True)
class LevelReport:
    """One level from 1 to L-1, over all strata. Tuples named by head have one number a kv head."""

    level: int
    spread_q: tuple[float, ...]
    """By head: standard deviation over mean of the query scores, which are squared norms."""
    spread_k: tuple[float, ...]
    """By head: the same of the key scores."""
    picks: tuple[float, ...]
    """By stratum: its share of the picks of all levels and strata. The method fixes it: each
    stratum takes m entries of each level."""
    parents: float | None
    """Share of these picks with at least one pick among their children: 1 / p where all picks of
    the next finer level are in as few as can be; None at level 1, whose children are tokens."""
    parents_by_head: tuple[float, ...]
    """By head: the same; none at level 1."""
    parents_by_stratum: tuple[float, ...]
    """By stratum: the same; none at level 1."""
    overlap: float | None
    """Jaccard index of two kv heads' picks, mean over pairs and sequences; None: one kv head."""
    near_ties: float
    """Share of picks within a relative `NEAR` of the best that is not picked; of those that scores
    decide: without the first entry of a sequence, which is always taken."""


@dataclass(frozen=True, kw_only=True)
class SelectionReport:
    """Whether the selection of one layer is alive. Made by `diagnose`; print it."""

    levels: tuple[LevelReport, ...]
    """The coarsest first, as selection goes."""
    warnings: tuple[str, ...]
    """What looks wrong, in words; none where nothing does."""
    seqlen: int
    """N."""
    world_size: int

    @property
    def spread_q(self) -> float:
        """Mean spread of the query scores over levels and heads."""
        return mean([x for level in self.levels for x in level.spread_q])

    @property
    def spread_k(self) -> float:
        """Mean spread of the key scores over levels and heads."""
        return mean([x for level in self.levels for x in level.spread_k])

    @property
    def near_ties(self) -> float:
        """Mean share of near-ties over levels, which have as many picks each."""
        return mean([level.near_ties for level in self.levels])

    @property
    def overlap(self) -> float | None:
        """Mean overlap between kv heads over levels; None: one kv head."""
        found = [level.overlap for level in self.levels if level.overlap is not None]
        return mean(found) if found else None

    def table(self) -> str:
        """Return the numbers as text, a row a level; of heads and strata mean and lowest."""
        titles = ("level", "spread q", "spread k", "overlap", "near-ties", "with picks below")
        rows: list[tuple[str, ...]] = [titles]
        for level in self.levels:
            both = (f"{mean(x):.3g} ({min(x):.3g})" for x in (level.spread_q, level.spread_k))
            rest = (_percent(x) for x in (level.overlap, level.near_ties, level.parents))
            rows.append((f"{level.level}", *both, *rest))
        widths = [max(len(row[i]) for row in rows) for i in range(len(titles))]
        lines = ["  ".join(x.rjust(w) for x, w in zip(row, widths, strict=True)) for row in rows]
        shares = [share for level in self.levels for share in level.picks]
        spread = f"{min(shares):.2%}" + (
            f" to {max(shares):.2%}" if max(shares) - min(shares) > 1e-9 else ""
        )
        return "\n".join(
            [
                f"selection of N={self.seqlen:,} on {self.world_size} ranks; in brackets the "
                "lowest head",
                *lines,
                f"share of the picks by level and stratum: {spread} each",
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """Return everything as a JSON-ready dict."""
        return asdict(self)

    def __str__(self) -> str:
        """Return the table and the warnings."""
        found = [f"warning: {text}" for text in self.warnings] or ["nothing looks wrong"]
        return "\n".join([self.table(), *found])


def summarize(counts: Counts, pool_factor: int, seqlen: int, world_size: int) -> SelectionReport:
    """Return the report of the whole sequence's counts."""
    counts = Counts(**{name: x.cpu() for name, x in vars(counts).items()})
    numbers = range(counts.picks.shape[0])
    levels = tuple(_level(counts, index) for index in reversed(numbers))
    return SelectionReport(
        levels=levels,
        warnings=tuple(_warnings(levels, counts, pool_factor)),
        seqlen=seqlen,
        world_size=world_size,
    )


def _level(counts: Counts, index: int) -> LevelReport:
    """Return the report of level index + 1."""
    picks, parents = counts.picks[index], counts.parents[index]
    fine = index == 0
    near, decided = counts.near[index].tolist()
    spread_q, spread_k = (_spread(moments[index]) for moments in counts.moments)
    return LevelReport(
        level=index + 1,
        spread_q=spread_q,
        spread_k=spread_k,
        picks=tuple((picks.sum(1) / counts.picks.sum()).tolist()),
        parents=None if fine else (parents.sum() / picks.sum()).item(),
        parents_by_head=() if fine else tuple((parents.sum(0) / picks.sum(0)).tolist()),
        parents_by_stratum=() if fine else tuple((parents.sum(1) / picks.sum(1)).tolist()),
        overlap=_overlap(counts.shared[:, index]),
        near_ties=near / decided if decided else 0.0,
    )


def _spread(moments: Tensor) -> tuple[float, ...]:
    """Return standard deviation over mean of [Hk, 3] number, sum, sum of squares; 0 of zeros."""
    found = []
    for number, total, squares in moments.tolist():
        average = total / number if number else 0.0
        variance = max(squares / number - average**2, 0.0) if number else 0.0
        found.append(variance**0.5 / average if average > 0 else 0.0)
    return tuple(found)


def _overlap(shared: Tensor) -> float | None:
    """Return the mean Jaccard index of pairs of heads, from [B, Hk, Hk] numbers of shared picks."""
    found = []
    for row in shared.tolist():
        for a, b in combinations(range(len(row)), 2):
            found.append(row[a][b] / (row[a][a] + row[b][b] - row[a][b]))
    return mean(found) if found else None


def _warnings(levels: Sequence[LevelReport], counts: Counts, pool_factor: int) -> list[str]:
    """Return what looks wrong, in words."""
    said = []
    for name, number in zip("qk", counts.not_finite.tolist(), strict=True):
        if number:
            said.append(
                f"{number:.0f} scores of {name} are not finite: they are taken before all others; "
                "look for NaN or inf in what is scored"
            )
    for name in ("q", "k"):
        spreads = [(x, level) for level in levels for x in _heads_below(level, name)]
        if spreads:
            where = ", ".join(f"head {head} at level {at.level}" for (head, _), at in spreads[:4])
            more = f" and {len(spreads) - 4} more" if len(spreads) > 4 else ""
            lowest = min(spread for (_, spread), _ in spreads)
            said.append(
                f"scores of {name} are nearly constant: their spread is {lowest:.2g} of the mean, "
                f"below {CONSTANT:g} ({where}{more}), so that rounding or the index decides. "
                "Models that normalise q and k have such norms: pass what they were before the "
                f"norm as score_{name}"
            )
    # Fewer picks are at the least number of parents by chance.
    if (counts.picks[0].sum() / counts.picks[0].numel()).item() >= 2 * pool_factor:
        for level in levels:
            for what, shares in (
                ("head", level.parents_by_head),
                ("stratum", level.parents_by_stratum),
            ):
                narrow = [i for i, x in enumerate(shares) if x <= 1 / pool_factor + 1e-9]
                if narrow:
                    listed = ", ".join(map(str, narrow[:8])) + (", ..." if len(narrow) > 8 else "")
                    said.append(
                        f"{what} {listed}: all picks of level {level.level - 1} lie in 1 of "
                        f"{pool_factor} picks of level {level.level}, as few as can be; the other "
                        "picks add nothing that is finer"
                    )
    if all(level.overlap is not None and level.overlap >= SAME for level in levels):
        said.append(
            f"all kv heads pick the same entries (overlap at least {SAME:.0%}): one selection "
            "would serve them all"
        )
    ties = [level.level for level in levels if level.near_ties > 0.5]
    if ties:
        said.append(
            f"more than half of the picks at levels {', '.join(map(str, ties))} are within "
            f"{NEAR:g} of the best that is not picked: rounding decides them"
        )
    return said


def _heads_below(level: LevelReport, name: str) -> list[tuple[int, float]]:
    """Return (head, spread) of the heads whose scores are nearly constant."""
    spreads = level.spread_q if name == "q" else level.spread_k
    return [(head, x) for head, x in enumerate(spreads) if x < CONSTANT]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def mean(values: Sequence[float]) -> float:
    """Return the mean of at least one number."""
    return sum(values) / len(values)
