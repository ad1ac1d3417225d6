"""Results of block calls, held until all that one query's result is made of can be merged at once.

Merging after every call would read and write a wide sum as often as there are calls. Here each
result is read once, in the dtype in which its call wrote it, and the whole is written once.
"""

import torch
from torch import Tensor

from lhcp.precision import wide
from lhcp.ring.merge.merge import add, merge
from lhcp.ring.merge.partial import Partial, Run
from lhcp.ring.shape import Tuning


class DeferredMerge:
    """Partial outputs with their lse, which are merged, or partial gradients, which are added.

    Once they hold more than `tuning.held_bytes`, or are `tuning.held_results`, they are merged into
    one wide partial: a long sequence's memory does not grow with the number of calls.

    Args:
        like: [B, S, H, D]: the whole result has its shape and dtype.
    """

    def __init__(self, like: Tensor, tuning: Tuning) -> None:
        self._like, self._tuning = like, tuning
        self._partials: list[Partial] = []
        self._bytes = 0

    def add(self, rows: Run, heads: Run, x: Tensor, lse: Tensor | None = None) -> None:
        """Take a call's result: x [B, rows, heads, D], lse [B, heads, rows]."""
        full = len(self._partials) == self._tuning.held_results
        if full or self._bytes > self._tuning.held_bytes:
            self._partials = [self._merged(wide(self._like.dtype))]
            self._bytes = 0
        self._partials.append(Partial(rows, heads, x, lse))
        self._bytes += x.numel() * x.element_size()

    def result(self) -> tuple[Tensor, Tensor | None]:
        """Merge what was taken, which covers every query and head; contiguous."""
        (first, *others) = self._partials
        if others or first.x.shape != self._like.shape or first.x.dtype != self._like.dtype:
            first = self._merged(self._like.dtype)
        return first.x.contiguous(), None if first.lse is None else first.lse.contiguous()

    def _merged(self, dtype: torch.dtype) -> Partial:
        """Merge all partials into one, of every query and head."""
        batch, tokens, heads, _ = self._like.shape
        x = self._like.new_empty(self._like.shape, dtype=dtype)
        if self._partials[0].lse is None:
            add(x, self._partials)
            return Partial.whole(x)
        lse = x.new_empty((batch, heads, tokens), dtype=wide(self._like.dtype))
        merge(x, lse, self._partials)
        return Partial.whole(x, lse)
