"""Measured times that the cost model reads: blocks of attention, memory and links, by machine.

A calibration is data: made by `bench/calibrate.py`, kept as JSON, read back here.
"""

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from math import exp, log
from pathlib import Path
from typing import Literal

Direction = Literal["forward", "backward"]
FullBlock = tuple[int, int, float, float]


@dataclass(frozen=True, kw_only=True)
class Link:
    """What one rank sends over, in one direction."""

    latency: float
    """Seconds from posting a message to its arrival, without its bytes."""
    bandwidth: float
    """Bytes a second."""
    hop: float | None = None
    """Seconds that each step of a ring collective adds to the latency of a message; None: a
    collective takes the latency of a message for each step."""

    def collective_latency(self, num_ranks: int) -> float:
        """Seconds that a ring collective takes without its bytes."""
        steps = num_ranks - 1
        return steps * self.latency if self.hop is None else self.latency + steps * self.hop


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What one machine needs for a block of attention, for a byte of memory and for a message."""

    name: str
    source: str
    """Where the numbers are from; what was not measured is named here."""
    num_heads: int
    """Query heads (times batch) at which the blocks were timed."""
    head_dim: int
    square: tuple[tuple[int, float, float], ...]
    """(tokens, forward, backward), seconds of causal attention of so many tokens, ascending."""
    full: tuple[FullBlock, ...] = ()
    """(queries, keys, forward, backward), seconds without a mask: every pair of a grid. Empty: as
    causal attention of the same number of products."""
    copy_bandwidth: float
    """Bytes a second of a copy, read and written bytes counted."""
    merge_bandwidth: float
    """Bytes a second of merging partial outputs and of adding gradients: what they read and write,
    over the time that they take."""
    launch: float
    """Seconds of the smallest operation."""
    inner: Link
    """Between ranks of a node."""
    outer: Link
    """Between nodes, for one rank."""
    gather_factor: float = 1.0
    """Time of a gather over that of neighbour messages of as many bytes."""
    alltoall_factor: float = 1.0
    """The same of an all-to-all."""
    byte_compute: float = 0.0
    """Seconds of compute that a byte takes from its sender, and as many from its receiver, if they
    compute while it is under way. 0: links move bytes by themselves, as a GPU's nearly do."""
    text: str = field(init=False, repr=False, compare=False)
    """This table as JSON."""

    def __hash__(self) -> int:
        # Equal tables have equal names; "auto" looks one up at every call.
        return hash((self.name, self.source))

    def block_seconds(
        self,
        direction: Direction,
        queries: int,
        keys: int,
        causal: bool,
        num_heads: int,
        head_dim: int,
    ) -> float:
        """Seconds of one block of attention.

        Args:
            num_heads: query heads, times the batch.
        """
        return _block_seconds(self, direction, queries, keys, causal, num_heads, head_dim)

    def grid_seconds(self, column: int, queries: float, keys: float) -> float:
        """Read the grid of unmasked blocks: column 0 forward, 1 backward; `num_heads` heads."""
        by_queries = [
            (q, interpolate([(k, t[column]) for r, k, *t in self.full if r == q], keys))
            for q in sorted({row[0] for row in self.full})
        ]
        return interpolate(by_queries, queries)

    def copy_seconds(self, num_bytes: float) -> float:
        """Seconds of one copy that reads and writes so many bytes."""
        return self.launch + num_bytes / self.copy_bandwidth

    def merge_seconds(self, num_bytes: float) -> float:
        """Seconds of adding or merging, with so many bytes read and written."""
        return self.launch + num_bytes / self.merge_bandwidth

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", "")
        values = {name: value for name, value in asdict(self).items() if name != "text"}
        object.__setattr__(self, "text", json.dumps(values, indent=1))

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        Path(path).write_text(self.text + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Read what `save` wrote.

        Raises:
            ValueError: the file does not hold a calibration.
        """
        return cls.from_text(Path(path).read_text(), str(path))

    @classmethod
    def from_text(cls, text: str, source: str) -> "Calibration":
        """Read JSON that `save` wrote; `source` is where it is from.

        Raises:
            ValueError: it does not hold a calibration.
        """
        try:
            fields = json.loads(text)
            for name in ("square", "full"):
                fields[name] = tuple(tuple(row) for row in fields[name])
            for name in ("inner", "outer"):
                fields[name] = Link(**fields[name])
            return cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{source} does not hold an lhcp calibration: {error}") from error


@cache
def _block_seconds(
    table: Calibration,
    direction: Direction,
    queries: int,
    keys: int,
    causal: bool,
    num_heads: int,
    head_dim: int,
) -> float:
    column = 0 if direction == "forward" else 1
    size = head_dim / table.head_dim
    if table.full and not causal:
        rows = queries * num_heads / table.num_heads
        return max(table.launch, table.grid_seconds(column, rows, keys) * size)
    work = queries * keys / (2 if causal else 1) * num_heads / table.num_heads * size
    points = [(n * n / 2, seconds[column]) for n, *seconds in table.square]
    return max(table.launch, interpolate(points, work))


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """Read a measured curve: straight lines between logarithms.

    Below the first point the first line goes on, but no steeper than in proportion; above the last
    one the curve is in proportion.

    Args:
        points: (x, y), ascending, positive.
    """
    if len(points) == 1 or x >= points[-1][0]:
        return points[-1][1] * x / points[-1][0]
    place = min(max(bisect_right([p[0] for p in points], x), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[place - 1 : place + 1]
    slope = log(y1 / y0) / log(x1 / x0)
    if x < x0:
        slope = min(max(slope, 0.0), 1.0)
    return y0 * exp(slope * log(x / x0))


def _full_blocks(
    rate: tuple[float, float], tiles: int
) -> tuple[tuple[int, int, float, float], ...]:
    """A grid of blocks without a mask, 8 heads of 128: at `rate` where they fill the machine.

    The forward works on tiles of 128 queries, the backward on tiles of 128 keys; with fewer than
    `tiles` of them a part of the machine is idle.
    """
    rows = []
    for queries in (2**i for i in range(8, 18)):
        for keys in (2**i for i in range(8, 20)):
            flops = 4 * queries * keys * 8 * 128
            filled = [min(1.0, n * 8 / 128 / tiles) for n in (queries, keys)]
            rows.append(
                (queries, keys, flops / rate[0] / filled[0], 2.5 * flops / rate[1] / filled[1])
            )
    return tuple(rows)


H200 = Calibration(
    name="H200",
    source=(
        "NVIDIA H200, torch 2.11.0+cu130, cuDNN 9.19, bf16, 2026-11-23 and -24. Blocks without a "
        "mask: 690 and 600 TFLOP/s where they fill 128 tiles, after prefixes of 2,048 to 16,384 "
        "queries. NVLink between two of them, 2026-11-25: 300 GB/s a direction, and 120 us for a "
        "batch of messages as the host launches it. InfiniBand is not measured: 400 Gb/s at 80%"
    ),
    num_heads=8,
    head_dim=128,
    square=(
        (6144, 0.206e-3, 0.550e-3),
        (8192, 0.291e-3, 0.774e-3),
        (12288, 0.643e-3, 1.58e-3),
        (18432, 1.23e-3, 3.11e-3),
        (24576, 2.06e-3, 5.42e-3),
        (32768, 3.43e-3, 9.91e-3),
        (49152, 8.23e-3, 23.1e-3),
        (65536, 14.7e-3, 40.1e-3),
        (98304, 34.2e-3, 91.9e-3),
        (131072, 61.1e-3, 163.9e-3),
        (262144, 268e-3, 649e-3),
    ),
    full=_full_blocks((690e12, 600e12), 128),
    copy_bandwidth=4.2e12,
    merge_bandwidth=3.0e12,
    launch=5e-6,
    inner=Link(latency=120e-6, bandwidth=300e9, hop=1e-6),
    outer=Link(latency=130e-6, bandwidth=40e9, hop=3e-6),
)

B200 = replace(
    H200,
    name="B200",
    source=(
        "not measured: the H200's blocks divided by 2.27 and its copy by 1.67, the ratios of the "
        "published bf16 and memory rates; NVLink 5 and 400 Gb/s InfiniBand at 80% of their rates; "
        "the H200's latency, which is the host's"
    ),
    square=tuple((n, f / 2.27, b / 2.27) for n, f, b in H200.square),
    full=_full_blocks((690e12 * 2.27, 600e12 * 2.27), 148),
    copy_bandwidth=7.0e12,
    merge_bandwidth=5.0e12,
    inner=Link(latency=120e-6, bandwidth=720e9, hop=1e-6),
    outer=Link(latency=130e-6, bandwidth=40e9, hop=3e-6),
)

CPU = Calibration(
    name="cpu",
    source=(
        "a guess at one thread of a server's core, torch's CPU kernel, fp32, and at what gloo "
        "takes of it for a byte; calibrate your own"
    ),
    num_heads=4,
    head_dim=64,
    square=((256, 1.2e-3, 3.5e-3), (1024, 15e-3, 45e-3), (4096, 220e-3, 650e-3)),
    copy_bandwidth=8e9,
    merge_bandwidth=3e9,
    launch=20e-6,
    inner=Link(latency=100e-6, bandwidth=1e9),
    outer=Link(latency=200e-6, bandwidth=100e6),
    byte_compute=0.4e-9,
)

CALIBRATIONS = {calibration.name: calibration for calibration in (H200, B200, CPU)}
