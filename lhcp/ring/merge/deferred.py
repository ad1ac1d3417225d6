"""Results of block calls, held until all that one query's result is made of can be merged at once.

Merging after every call would read and write a wide sum as often as there are calls. Here each
result is read once, in the dtype in which its call wrote it, and the whole is written once.
"""

import torch
from torch import Tensor

from lhcp.ring.merge.merge import Part, Run, add, merge
from lhcp.ring.rotation.base import HELD_BYTES, wide

HELD_PARTS = 32
"""Each is twelve arguments of one kernel, whose arguments have 4 KiB."""


class Partials:
    """Partial outputs with their lse, which are merged, or partial gradients, which are added.

    Once they hold more than `HELD_BYTES`, or are `HELD_PARTS`, they are merged into one wide part:
    a long sequence's memory does not grow with the number of calls.

    Args:
        like: [B, S, H, D]: the whole result has its shape and dtype.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._parts: list[Part] = []
        self._bytes = 0

    def add(self, rows: Run, heads: Run, x: Tensor, lse: Tensor | None = None) -> None:
        """Take a call's result: x [B, rows, heads, D], lse [B, heads, rows]."""
        if self._bytes > HELD_BYTES or len(self._parts) == HELD_PARTS:
            self._parts = [self._merged(wide(self._like.dtype))]
            self._bytes = 0
        self._parts.append(Part(rows, heads, x, lse))
        self._bytes += x.numel() * x.element_size()

    def result(self) -> tuple[Tensor, Tensor | None]:
        """Merge what was taken, which covers every query and head; contiguous."""
        (first, *others) = self._parts
        if others or first.x.shape != self._like.shape or first.x.dtype != self._like.dtype:
            first = self._merged(self._like.dtype)
        return first.x.contiguous(), None if first.lse is None else first.lse.contiguous()

    def _merged(self, dtype: torch.dtype) -> Part:
        """All parts as one, of every query and head."""
        batch, tokens, heads, _ = self._like.shape
        x = self._like.new_empty(self._like.shape, dtype=dtype)
        if self._parts[0].lse is None:
            add(x, self._parts)
            return Part.whole(x)
        lse = x.new_empty((batch, heads, tokens), dtype=wide(self._like.dtype))
        merge(x, lse, self._parts)
        return Part.whole(x, lse)
