"""`Partial`: the result of one block call, to be merged or added with others."""

from dataclasses import dataclass

from torch import Tensor

Run = tuple[int, int]


@dataclass(frozen=True)
class Partial:
    """A call's result for [start, stop) of the queries and of the heads."""

    rows: Run
    heads: Run
    x: Tensor
    """[B, rows, heads, D], any float dtype; D lies together."""
    lse: Tensor | None = None
    """[B, heads, rows] of an attention; None of a gradient."""

    @staticmethod
    def whole(x: Tensor, lse: Tensor | None = None) -> "Partial":
        """Return the partial that covers everything."""
        return Partial((0, x.shape[1]), (0, x.shape[2]), x, lse)

    def of(self, x: Tensor) -> Tensor:
        """Return the queries and heads of this partial, of [B, S, H, D]."""
        return x[:, slice(*self.rows), slice(*self.heads)]

    def of_lse(self, lse: Tensor) -> Tensor:
        """Return the queries and heads of this partial, of [B, H, S]."""
        return lse[:, slice(*self.heads), slice(*self.rows)]
