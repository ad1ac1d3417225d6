"""Measured times that the cost model reads: blocks of attention, memory and links, by machine.

A calibration is data: made by `lhcp calibrate`, kept as JSON, read back here.
"""

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from math import exp, log
from operator import itemgetter
from pathlib import Path
from typing import Literal, NamedTuple

from lhcp.ring.shape import Mask

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
    gather_factor: float = 1.0
    """Time of a gather over that of neighbour messages of as many bytes."""
    alltoall_factor: float = 1.0
    """The same of an all-to-all."""

    def collective_latency(self, num_ranks: int) -> float:
        """Return the seconds that a ring collective takes without its bytes."""
        steps = num_ranks - 1
        return steps * self.latency if self.hop is None else self.latency + steps * self.hop


@dataclass(frozen=True, kw_only=True)
class Host:
    """Seconds of the host for what a GPU is given to do. While they add up to more than the GPU
    takes, the GPU waits. In a CUDA graph they are nothing."""

    call: float = 0.0
    """One block of attention: its views, its stream, its kernels, its part of a merge."""
    message: float = 0.0
    """One batch of messages, or one collective: posting it and waiting for it."""
    launch: float = 0.0
    """One copy or sum."""


class BlockSize(NamedTuple):
    """One block of attention."""

    queries: int
    keys: int
    mask: Mask
    num_heads: int
    """Query heads, times the batch."""
    head_dim: int


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
    nics: int | None = None
    """NICs of a node, which its ranks share where they are more; None: one a rank. `outer` has the
    bandwidth of one."""
    host: Host = Host()
    """What launching takes where no graph does. A CPU's is in its other times."""
    byte_compute: float = 0.0
    """Seconds of compute that a byte takes from its sender, and as many from its receiver, if they
    compute while it is under way. 0: links move bytes by themselves, as a GPU's nearly do."""
    text: str = field(init=False, repr=False, compare=False)
    """This table as JSON."""

    def __hash__(self) -> int:
        # Equal tables have equal names; one is looked up at every call.
        return hash((self.name, self.source))

    def block_seconds(self, direction: Direction, size: BlockSize) -> float:
        """Return the seconds of one block of attention."""
        return _block_seconds(self, direction, size)

    def grid_seconds(self, column: int, queries: float, keys: float) -> float:
        """Read the grid of unmasked blocks: column 0 forward, 1 backward; `num_heads` heads."""
        curves = _curves(self, column)
        # Only those on both sides matter.
        above = min(max(bisect_right(curves, queries, key=itemgetter(0)), 1), len(curves) - 1)
        near = curves[-1:] if queries >= curves[-1][0] else curves[above - 1 : above + 1]
        return interpolate([(q, interpolate(curve, keys)) for q, curve in near], queries)

    def copy_seconds(self, num_bytes: float) -> float:
        """Return the seconds of one copy that reads and writes so many bytes."""
        return self.launch + num_bytes / self.copy_bandwidth

    def merge_seconds(self, num_bytes: float) -> float:
        """Return the seconds of adding or merging, with so many bytes read and written."""
        return self.launch + num_bytes / self.merge_bandwidth

    def across(self, node_size: int | None) -> Link:
        """Return the link between nodes of one of `node_size` ranks, all of which send at once."""
        if self.nics is None or node_size is None or node_size <= self.nics:
            return self.outer
        return replace(self.outer, bandwidth=self.outer.bandwidth * self.nics / node_size)

    def in_graphs(self) -> "Calibration":
        """Return the same machine with all launches in CUDA graphs, as `lhcp.graphed` has them."""
        return replace(self, name=f"{self.name}, graphs", host=Host())

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
            fields["host"] = Host(**fields.get("host", {}))
            return cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{source} does not hold an lhcp calibration: {error}") from error


@cache
def _curves(table: Calibration, column: int) -> list[tuple[int, list[tuple[int, float]]]]:
    """Return the grid by queries, ascending: for each the curve of seconds over keys."""
    rows = sorted({row[0] for row in table.full})
    return [(q, [(k, t[column]) for r, k, *t in table.full if r == q]) for q in rows]


@cache
def _block_seconds(table: Calibration, direction: Direction, size: BlockSize) -> float:
    column = 0 if direction == "forward" else 1
    width = size.head_dim / table.head_dim
    if table.full and not size.mask.causal:
        rows = size.queries * size.num_heads / table.num_heads
        return max(table.launch, table.grid_seconds(column, rows, size.keys) * width)
    pairs = size.queries * size.keys / (2 if size.mask.causal else 1)
    work = pairs * size.num_heads / table.num_heads * width
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
    above = min(max(bisect_right(points, x, key=itemgetter(0)), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[above - 1 : above + 1]
    slope = log(y1 / y0) / log(x1 / x0)
    if x < x0:
        slope = min(max(slope, 0.0), 1.0)
    return y0 * exp(slope * log(x / x0))
