"""What a rotation is: it brings keys and values round and their gradients back to their owners.

One object serves one forward or one backward. Every rank opens the same collectives, with the same
sizes, in the same order, whatever its calls are: a step with nothing to compute still sends.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist

from lhcp.comm.layout import Layout
from lhcp.comm.mesh import Ranks
from lhcp.ring.kv import KV
from lhcp.ring.schedule import Call, Step
from lhcp.ring.shape import AttentionShape, Mask
from lhcp.timing import Spans


@dataclass(frozen=True)
class RotationContext:
    """What every rotation is made from."""

    ranks: Ranks
    shape: AttentionShape
    backward: bool
    spans: Spans

    @property
    def layout(self) -> Layout:
        """How the sequence is cut over the ranks."""
        return self.shape.layout

    @property
    def mask(self) -> Mask:
        """The mask of the whole attention."""
        return self.shape.mask

    @property
    def group(self) -> dist.ProcessGroup:
        """All ranks; there is more than one wherever a rotation is used."""
        assert self.ranks.flat is not None
        return self.ranks.flat

    def waiting(self, index: int, device: torch.device) -> AbstractContextManager[None]:
        """Open the span of the wait number `index` for messages."""
        name = "ring_backward" if self.backward else "ring_forward"
        return self.spans.span(name, "wait", index, device)


class Delivery(NamedTuple):
    """Keys and values that have come, and what they are used for."""

    step: Step
    kv: KV
    """[B, tokens, heads of the step, D], valid while they are referred to."""


class CallGrads(NamedTuple):
    """Gradients of one call's run of keys and values: [B, run, heads, D]."""

    call: Call
    grads: KV


class Rotation(Protocol):
    """Delivers keys and values step by step; in the backward, collects and returns gradients."""

    steps: tuple[Step, ...]
    step_bytes: int
    """Bytes of the keys and values of a step at most, on any rank. How many steps wait to be
    finished follows from it, and so what is sent in which order: it must be the same everywhere."""

    def deliver(self) -> Iterator[Delivery]:
        """Yield each step's keys and values in order, with the next exchange already under way.

        The calls of the first step of each run of heads cover every query.
        """
        ...

    def collect(self, step: int, grads: Sequence[CallGrads]) -> None:
        """Take the gradients of step number `step`, in order; once for every step."""
        ...

    def owned_grads(self) -> KV:
        """Return dk and dv of this rank's own tokens, once all ranks' parts have arrived.

        Summed wide and rounded once to the dtype of k, in memory of their own.
        """
        ...


MakeRotation = Callable[[RotationContext, KV], Rotation]
"""Makes a rotation for one direction, of this rank's own keys and values."""
