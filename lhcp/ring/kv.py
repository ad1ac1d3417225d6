"""Keys and values, which are cut, sent and attended to together."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class KV(NamedTuple):
    """Keys and values of the same tokens, or their gradients: [B, tokens, heads, D] each.

    Views are made here alone. DESIGN.md says what else must follow when keys get a field more.
    """

    k: Tensor
    v: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "KV":
        """Return what `change` makes of the keys and of the values."""
        return KV(change(self.k), change(self.v))

    def tokens(self, start: int, stop: int) -> "KV":
        """Return a run of the tokens, as views."""
        return self.map(lambda x: x[:, start:stop])

    def heads(self, start: int, stop: int) -> "KV":
        """Return a run of the heads, as views."""
        return self.map(lambda x: x[:, :, start:stop])
