"""The ring: keys and values go to the next rank at every step, their gradients along behind them.

k and v travel packed in one message. Two buffers take turns, and the next exchange is posted before
the step is computed. A rank sends W-1 messages in the forward and 2W-1 in the backward.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lhcp.ring.rotation.base import Grads, Trip, add_tokens, zeros_wide
from lhcp.ring.rotation.messages import RingBuffers
from lhcp.ring.schedule import Step, p2p_steps


class P2P:
    """`Rotation` by send and receive between neighbours."""

    def __init__(self, trip: Trip, k: Tensor) -> None:
        self._trip, self._like = trip, k
        self.steps = p2p_steps(trip.ranks.rank, trip.layout, trip.causal, k.shape[2])
        self._grads: RingBuffers | None = None

    def deliver(self, k: Tensor, v: Tensor) -> Iterator[tuple[Step, Tensor, Tensor]]:
        trip = self._trip
        kv = RingBuffers(trip.group, torch.stack((k, v)))
        for i, step in enumerate(self.steps):
            last = i + 1 == len(self.steps)
            if not last:
                kv.post()
            yield step, kv.current[0], kv.current[1]
            if not last:
                with trip.spans.span(trip.stage, "wait", i, k.device):
                    kv.arrive()

    def collect(self, step: int, grads: Sequence[Grads]) -> None:
        like, trip = self._like, self._trip
        if self._grads is None:
            self._grads = RingBuffers(trip.group, zeros_wide(like, 2, *like.shape))
        else:
            self._arrive(step)
        chunk = like.shape[1] // trip.layout.chunks_per_rank
        add_tokens(self._grads.current, grads, chunk)
        self._grads.post()

    def home(self) -> tuple[Tensor, Tensor]:
        dk, dv = self._arrive(len(self.steps))
        return dk, dv

    def _arrive(self, step: int) -> Tensor:
        assert self._grads is not None
        with self._trip.spans.span(self._trip.stage, "wait", step, self._like.device):
            self._grads.arrive()
        return self._grads.current
