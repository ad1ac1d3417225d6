"""The arithmetic of a training step's table: sizes, extrapolation, the limit. No GPU."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from lhcp.config import LighthouseConfig
from lhcp.training.model_config import ModelConfig

Row = dict[str, Any]
"""One line of the table, as it goes into the JSON document."""

PAPER_STEPS = (10_000, 6_000)
"""Lighthouse steps, then dense ones."""
PAPER_TOKENS = 32 * 98_304
"""Tokens of one step of the paper's run."""


def config_for(seqlen: int, num_strata: int = 16) -> LighthouseConfig:
    """Return the layer of the paper that fits `seqlen`: k=1536, or N/16 where that is smaller.

    From a million tokens on it is the paper's other one: four levels, k=4096.
    """
    if seqlen >= 2**20:
        return LighthouseConfig(num_levels=4, pool_factor=4, topk=4096, num_strata=num_strata)
    unit = 2 * num_strata
    topk = max(min(1536, seqlen // 16) // unit * unit, unit)
    return LighthouseConfig(num_levels=3, pool_factor=4, topk=topk, num_strata=num_strata)


@dataclass(frozen=True)
class Point:
    """One length with dense and lighthouse seconds; what a curve needs."""

    seqlen: int
    dense: float
    lighthouse: float

    @property
    def speedup(self) -> float:
        return self.dense / self.lighthouse


@dataclass(frozen=True)
class Quadratic:
    """seconds(N) = a + b N + c N^2, with N in units of 65,536 tokens."""

    a: float
    b: float
    c: float

    def __call__(self, seqlen: int) -> float:
        n = seqlen / 65_536
        return self.a + self.b * n + self.c * n * n

    @classmethod
    def through(cls, seqlens: Sequence[int], seconds: Sequence[float]) -> "Quadratic":
        """Fit by least squares of relative errors; with two points a = 0, exactly through them.

        Raises:
            ValueError: fewer than two points.
        """
        if len(seqlens) < 2:
            raise ValueError(f"{len(seqlens)} measured dense lengths: extrapolation needs two")
        n, y = np.array(seqlens) / 65_536, np.array(seconds)
        powers = (1, 2) if len(n) == 2 else (0, 1, 2)
        table = np.stack([n**power for power in powers], axis=1) / y[:, None]
        solved = np.linalg.lstsq(table, np.ones(len(n)), rcond=None)[0]
        a, b, c = [0.0] * (3 - len(powers)) + [float(x) for x in solved]
        return cls(a, b, c)


def crossover(points: Sequence[Point]) -> float | None:
    """Return the length where the speed-up passes 1, linear in log2 N between measured lengths.

    Returns:
        The last such length; None if lighthouse is faster, or slower, at all of them.
    """
    ordered = sorted(points, key=lambda point: point.seqlen)
    for low, high in reversed(list(pairwise(ordered))):
        if low.speedup < 1 <= high.speedup:
            share = (1 - low.speedup) / (high.speedup - low.speedup)
            return float(low.seqlen * (high.seqlen / low.seqlen) ** share)
    return None


def paper_hours(point: Point) -> tuple[float, float]:
    """Return GPU hours of the paper's 10k + 6k steps and of 16k dense ones of as many tokens."""
    sequences = PAPER_TOKENS / point.seqlen
    sparse, dense = PAPER_STEPS
    two_stages = sparse * point.lighthouse + dense * point.dense
    return two_stages * sequences / 3600, (sparse + dense) * point.dense * sequences / 3600


@dataclass(frozen=True)
class AttentionSeconds:
    """Seconds of one attention over a length."""

    forward: float
    backward: float

    def total(self, recompute: bool) -> float:
        """Return seconds in a step; recomputing runs the forward twice."""
        return self.forward * (1 + recompute) + self.backward

    def scaled(self, factor: float) -> "AttentionSeconds":
        return AttentionSeconds(self.forward * factor, self.backward * factor)


def limit_step(row: Row, whole: AttentionSeconds, row_seconds: float) -> float:
    """Return seconds of a step whose lighthouse layers are at their limit.

    The limit of a layer is its attention over the sub-sequence plus, a direction, q, k, v read
    once, o written once, the gathered three written and the attention's output read. Everything
    else in the step is as in the dense one.

    Args:
        row: with the seconds of a dense step, and of the attention kernel over S.
        whole: the attention kernel over N.
        row_seconds: that one token's heads take at the rate of a copy, read and written.
    """
    recompute = row["checkpointed"]
    traffic = 4 * (row["seqlen"] + row["subsequence"]) * row_seconds
    limit = AttentionSeconds(**row["attention_short"]).total(recompute) + traffic * (2 + recompute)
    return float(
        row["dense"]["seconds"] + row["lighthouse_layers"] * (limit - whole.total(recompute))
    )


def complete(rows: list[Row], config: ModelConfig, copy_rate: float) -> None:
    """Add what follows from the measurements: extrapolated dense steps, speed-ups, limits."""
    for checkpointed in (False, True):
        chosen = [
            row for row in rows if row["checkpointed"] == checkpointed and "lighthouse" in row
        ]
        known = [row for row in chosen if "attention_whole" in row]
        if len(known) > 1:
            curve = Quadratic.through(
                [row["seqlen"] for row in known], [row["dense"]["seconds"] for row in known]
            )
            for row in chosen:
                if row not in known:
                    row["dense"] = {"seconds": curve(row["seqlen"]), "extrapolated": asdict(curve)}
        for row in chosen:
            if "dense" not in row:
                continue
            # Where dense was not run, its attention grows as N^2 from the longest that was.
            longest = max(known, key=lambda one: one["seqlen"])
            factor = 1.0 if row in known else (row["seqlen"] / longest["seqlen"]) ** 2
            whole = AttentionSeconds(**(row if row in known else longest)["attention_whole"])
            row_seconds = 2 * config.num_heads * config.head_dim / copy_rate
            limit = limit_step(row, whole.scaled(factor), row_seconds)
            point = Point(row["seqlen"], row["dense"]["seconds"], row["lighthouse"]["seconds"])
            row["limit_seconds"], row["speedup"] = limit, point.speedup
            row["limit_speedup"] = point.dense / limit
