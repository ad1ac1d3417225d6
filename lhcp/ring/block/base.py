"""What a block attention backend is: a forward that returns lse, a backward from merged results."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lhcp.ring.kv import KV
from lhcp.ring.shape import Mask

Grads = tuple[Tensor, Tensor, Tensor]
"""dq [B, Sq, H, D], dk and dv [B, Sk, Hk, D]."""


class BackwardInputs(NamedTuple):
    """What gradients are computed from."""

    dout: Tensor
    """[B, Sq, H, D]."""
    q: Tensor
    """[B, Sq, H, D]."""
    kv: KV
    """[B, Sk, Hk, D], not repeated."""
    out: Tensor
    """[B, Sq, H, D], of the whole attention, merged over all blocks."""
    lse: Tensor
    """[B, H, Sq], of the whole attention too."""


@dataclass(frozen=True, eq=False)
class Bounds:
    """Runs of a call's queries, and of its keys, that attend to one another and to nothing else.

    In flash-attn's form, with the rows of a batch laid end to end: run i is of queries q[i] to
    q[i + 1] and of keys kv[i] to kv[i + 1]; either may be empty, and together they are all rows. A
    causal call's runs of queries and keys are the same.
    """

    q: Tensor
    """int32 [runs + 1], on the device."""
    kv: Tensor
    """int32 [runs + 1]."""
    longest_q: int
    """Rows of a run of queries, at most."""
    longest_kv: int
    per_head: bool
    """Each kv head of a batch row has runs of its own: its rows are laid end to end, head by head.
    Else all heads share those of the batch row."""

    @property
    def all_meet(self) -> bool:
        """Whether runs of queries and of keys are the same ones, so that each query meets a key."""
        return self.q is self.kv

    @cached_property
    def used(self) -> tuple[Tensor, Tensor]:
        """How many queries and keys of each run are attended with: none where either is empty."""
        num_q, num_kv = self.q.diff(), self.kv.diff()
        return num_q.where(num_kv > 0, 0), num_kv.where(num_q > 0, 0)


@dataclass(frozen=True)
class Request:
    """What a backend is asked to do: static facts, which every rank sees alike."""

    dtype: torch.dtype
    head_dim: int
    device: str
    """The type of device."""
    capability: tuple[int, int] | None = None
    """The compute capability of a CUDA device."""
    deterministic: bool = False
    """Whether `torch.use_deterministic_algorithms(True)` is in force."""
    documents: bool = False
    """Whether rows are packed of documents."""


Forward = Callable[[Tensor, KV, Mask, float], tuple[Tensor, Tensor]]
Backward = Callable[[BackwardInputs, Mask, float], Grads]


@dataclass(frozen=True)
class PackedCalls:
    """A block's two functions where documents cut a call: each query attends inside its run.

    A query whose run has no keys has out 0 and lse -inf, and gives no gradients.
    """

    forward: Callable[[Tensor, KV, Mask, Bounds, float], tuple[Tensor, Tensor]]
    """(q, kv, mask, bounds, scale), as `Block.forward`."""
    backward: Callable[[BackwardInputs, Mask, Bounds, float], Grads]
    """(inputs, mask, bounds, scale), as `Block.backward`."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Attention of one run of queries to one run of keys and values.

    forward(q, kv, mask, scale) -> (out, lse): q [B, Sq, H, D]; kv [B, Sk, Hk, D], not repeated; out
    [B, Sq, H, D] in the dtype of q; lse [B, H, Sq], natural log, float32 (float64 for float64). A
    causal mask comes with Sq = Sk only.

    backward(inputs, mask, scale) -> (dq, dk, dv): this block's part of the gradients.
    """

    name: str
    forward: Forward
    backward: Backward
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    preference: int
    """Of several backends that can, the one with the lowest number is taken."""
    max_head_dim: int | None = None
    head_dim_multiple: int = 1
    other_rules: Callable[[Request], str | None] = lambda asked: None
    """Says why the backend cannot do it, or None: rules that are none of the above."""
    can_be_deterministic: bool = True
    """Whether the backward obeys `torch.use_deterministic_algorithms(True)`."""
    missing: str | None = None
    """Why the backend cannot be used at all, with what to install; None if it can."""
    packed: PackedCalls | None = None
    """The same of rows that are packed of documents; None: it cannot."""

    def refuses(self, asked: Request) -> str | None:
        """Return why this backend cannot do what is asked, or None if it can."""
        if asked.device not in self.devices:
            return f"inputs are on {asked.device}, it runs on {', '.join(self.devices)}"
        if asked.dtype not in self.dtypes:
            return f"inputs are {asked.dtype}, it takes {', '.join(map(str, self.dtypes))}"
        if self.max_head_dim is not None and asked.head_dim > self.max_head_dim:
            return f"head_dim={asked.head_dim}, it takes at most {self.max_head_dim}"
        if asked.head_dim % self.head_dim_multiple:
            return f"head_dim={asked.head_dim}, it takes multiples of {self.head_dim_multiple}"
        if asked.deterministic and not self.can_be_deterministic:
            return "its backward is not deterministic and torch.use_deterministic_algorithms is on"
        if asked.documents and self.packed is None:
            return "it has no bounds of documents (cu_seqlens)"
        return self.other_rules(asked)
