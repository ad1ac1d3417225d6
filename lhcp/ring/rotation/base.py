"""What a rotation is: it brings keys and values round and their gradients home.

One object serves one forward or one backward. Every rank opens the same collectives, with the same
sizes, in the same order, whatever its calls are: a step with nothing to compute still sends.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lhcp.comm.layout import Layout
from lhcp.comm.mesh import Ranks
from lhcp.ring.schedule import Call, Step
from lhcp.timing import Spans

HELD_BYTES = 2**28
"""Partial results that are kept until all can be summed at once, of outputs or of gradients. Where
there are more, sums are made on the way: memory then does not grow with the number of ranks."""


@dataclass(frozen=True)
class Trip:
    """What every rotation is made from."""

    ranks: Ranks
    layout: Layout
    causal: bool
    num_heads: int
    """Of queries."""
    backward: bool
    spans: Spans

    @property
    def stage(self) -> str:
        """The name in the profile."""
        return "ring_backward" if self.backward else "ring_forward"

    @property
    def group(self) -> dist.ProcessGroup:
        """All ranks; there is more than one wherever a rotation is used."""
        assert self.ranks.flat is not None
        return self.ranks.flat


@dataclass(frozen=True)
class Grads:
    """Gradients of one call's run of keys and values: [B, run, heads, D]."""

    call: Call
    dk: Tensor
    dv: Tensor


class Rotation(Protocol):
    """Deliver kv step by step; in the backward, collect the gradients and bring them home."""

    steps: tuple[Step, ...]
    step_bytes: int
    """Of the keys and values of a step at most, on any rank. How many steps wait to be finished
    follows from it, and so what is sent in which order: it must be the same on every rank."""

    def deliver(self, k: Tensor, v: Tensor) -> Iterator[tuple[Step, Tensor, Tensor]]:
        """Yield (step, k, v) in order, with the next exchange already under way.

        k, v: [B, tokens, heads of the step, D], valid while they are referred to. The calls of the
        first step of each run of heads cover every query.
        """
        ...

    def collect(self, step: int, grads: Sequence[Grads]) -> None:
        """Take the gradients of step number `step`, in order; once for every step."""
        ...

    def home(self) -> tuple[Tensor, Tensor]:
        """Return dk and dv of this rank's own tokens, once all ranks' parts have arrived.

        Summed wide and rounded once to the dtype of k, in memory of their own.
        """
        ...


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over calls: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
