"""Results of block calls, held until all that one query's result is made of can be merged at once.

Merging after every call would read and write a wide sum as often as there are calls. Here each
result is read once, in the dtype in which its call wrote it, and the whole is written once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lhcp.ring.merge import add, merge
from lhcp.ring.rotation.base import HELD_BYTES, wide

Run = tuple[int, int]


@dataclass(frozen=True)
class _Part:
    """A call's result for some queries and heads."""

    rows: Run
    heads: Run
    x: Tensor
    """[B, rows, heads, D]."""
    lse: Tensor | None
    """[B, heads, rows]."""

    def covers(self, rows: Run, heads: Run) -> bool:
        """Whether a cell lies in this part."""
        return (
            self.rows[0] <= rows[0]
            and rows[1] <= self.rows[1]
            and self.heads[0] <= heads[0]
            and heads[1] <= self.heads[1]
        )

    def cut(self, rows: Run, heads: Run) -> "_Part":
        """The cell's part of this one."""
        row = slice(rows[0] - self.rows[0], rows[1] - self.rows[0])
        head = slice(heads[0] - self.heads[0], heads[1] - self.heads[0])
        lse = None if self.lse is None else self.lse[:, head, row]
        return _Part(rows, heads, self.x[:, row, head], lse)


class Partials:
    """Partial outputs with their lse, which are merged, or partial gradients, which are added.

    Once they hold more than `HELD_BYTES` they are merged into one wide part: a long sequence's
    memory does not grow with the number of calls.

    Args:
        like: [B, S, H, D]: the whole result has its shape and dtype.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._parts: list[_Part] = []
        self._bytes = 0

    def add(self, rows: Run, heads: Run, x: Tensor, lse: Tensor | None = None) -> None:
        """Take a call's result: x [B, rows, heads, D], lse [B, heads, rows]."""
        tokens, num_heads = self._like.shape[1:3]
        if self._bytes > HELD_BYTES and self._parts[0].covers((0, tokens), (0, num_heads)):
            self._merge(wide(self._like.dtype))
            self._bytes = 0
        self._parts.append(_Part(rows, heads, x, lse))
        self._bytes += x.numel() * x.element_size()

    def result(self) -> tuple[Tensor, Tensor | None]:
        """Merge what was taken, which covers every query and head; contiguous."""
        (first, *others) = self._parts
        if others or first.x.shape != self._like.shape or first.x.dtype != self._like.dtype:
            self._merge(self._like.dtype)
            (first,) = self._parts
        return first.x.contiguous(), None if first.lse is None else first.lse.contiguous()

    def _merge(self, dtype: torch.dtype) -> None:
        """Let one part, of every query and head, take the place of all."""
        batch, tokens, heads, _ = self._like.shape
        x = self._like.new_empty(self._like.shape, dtype=dtype)
        lse = None
        if self._parts[0].lse is not None:
            lse = x.new_empty((batch, heads, tokens), dtype=wide(self._like.dtype))
        whole = _Part((0, tokens), (0, heads), x, lse)
        for cell, parts in self._cells():
            into = whole.cut(cell.rows, cell.heads)
            lses = [part.lse for part in parts if part.lse is not None]
            if into.lse is None:
                add(into.x, [part.x for part in parts])
            else:
                merge(into.x, into.lse, [part.x for part in parts], lses)
        self._parts = [whole]

    def _cells(self) -> Iterator[tuple[_Part, Sequence[_Part]]]:
        """Yield the cells that the parts' edges cut, with what each is merged from."""
        rows, heads = (
            sorted({edge for part in self._parts for edge in run(part)})
            for run in (lambda part: part.rows, lambda part: part.heads)
        )
        for row in pairwise(rows):
            for head in pairwise(heads):
                parts = [part.cut(row, head) for part in self._parts if part.covers(row, head)]
                if parts:
                    yield parts[0], parts
