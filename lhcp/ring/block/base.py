"""What a block attention backend is: a forward that returns lse, a backward from merged results."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Forward = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
Backward = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor, Tensor]
]


@dataclass(frozen=True)
class Block:
    """Attention of one run of queries to one run of keys and values.

    forward(q, k, v, causal, scale) -> (out, lse): q [B, Sq, H, D]; k, v [B, Sk, Hk, D], not
    repeated; out [B, Sq, H, D] in the dtype of q; lse [B, H, Sq], natural log, float32 (float64 for
    float64). `causal` comes with Sq = Sk only.

    backward(dout, q, k, v, out, lse, causal, scale) -> (dq, dk, dv): `out` and `lse` are those of
    the whole attention, merged over all blocks; the results are this block's part of the gradients.
    """

    name: str
    forward: Forward
    backward: Backward
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    max_head_dim: int | None = None
    head_dim_multiple: int = 1
    can_be_deterministic: bool = True
    """Whether the backward obeys `torch.use_deterministic_algorithms(True)`."""
    missing: str | None = None
    """Why the backend cannot be used at all, with what to install; None if it can."""

    def refuses(self, dtype: torch.dtype, head_dim: int, device: torch.device) -> str | None:
        """Return why this backend cannot do such inputs, or None if it can."""
        if device.type not in self.devices:
            return f"inputs are on {device.type}, it runs on {', '.join(self.devices)}"
        if dtype not in self.dtypes:
            return f"inputs are {dtype}, it takes {', '.join(map(str, self.dtypes))}"
        if self.max_head_dim is not None and head_dim > self.max_head_dim:
            return f"head_dim={head_dim}, it takes at most {self.max_head_dim}"
        if head_dim % self.head_dim_multiple:
            return f"head_dim={head_dim}, it takes multiples of {self.head_dim_multiple}"
        if torch.are_deterministic_algorithms_enabled() and not self.can_be_deterministic:
            return "its backward is not deterministic and torch.use_deterministic_algorithms is on"
        return None
