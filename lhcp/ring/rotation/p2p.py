"""The ring: keys and values go to the next rank at every step; their gradients go straight home.

k and v travel packed in one message, and the next exchange is posted before the step is computed. A
step's parts of dk and dv are sent to the owner of its keys, `i` ranks back at step i, and summed
there: no sum has to wait for the one before it, and none travels wide.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lhcp.ring.parts import shard_run
from lhcp.ring.rotation.base import Grads, Trip, wide
from lhcp.ring.rotation.messages import Exchange, RingBuffers, arriving
from lhcp.ring.schedule import Step, p2p_steps


class P2P:
    """`Rotation` by send and receive between neighbours."""

    def __init__(self, trip: Trip, k: Tensor) -> None:
        self._trip, self._like = trip, k
        self.steps = p2p_steps(trip.ranks.rank, trip.layout, trip.causal, k.shape[2])
        self._chunk = k.shape[1] // trip.layout.chunks_per_rank
        self._total: tuple[Tensor, Tensor] | None = None
        self._leaving: Exchange | None = None

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
        if step == 0:
            # The own keys: one call over all of them.
            dtype = wide(self._like.dtype)
            self._total = (grads[0].dk.to(dtype, copy=True), grads[0].dv.to(dtype, copy=True))
            return
        self._arrive(step)
        trip = self._trip
        outgoing = [x.contiguous() for part in grads for x in (part.dk, part.dv)]
        rows = self._rows(step)
        shape = (self._like.shape[0], rows.stop - rows.start, *self._like.shape[2:])
        incoming = [arriving(self._like, *shape) for _ in range(2) if rows.start < rows.stop]
        self._leaving = Exchange(trip.group, outgoing, incoming, distance=-step)

    def home(self) -> tuple[Tensor, Tensor]:
        self._arrive(len(self.steps))
        assert self._total is not None
        dk, dv = (x.to(self._like.dtype) for x in self._total)
        return dk, dv

    def _rows(self, step: int) -> slice:
        """This rank's tokens that the rank `step` further on attends to."""
        ranks = self._trip.ranks
        other = (ranks.rank + step) % ranks.world_size
        start, stop = shard_run(self._trip.layout, self._trip.causal, other, ranks.rank)
        return slice(start * self._chunk, stop * self._chunk)

    def _arrive(self, step: int) -> None:
        """Add what the exchange of the step before brought."""
        if self._leaving is None:
            return
        trip = self._trip
        with trip.spans.span(trip.stage, "wait", len(self.steps) + step - 2, self._like.device):
            self._leaving.wait()
        assert self._total is not None
        for total, part in zip(self._total, self._leaving.incoming, strict=False):
            total[:, self._rows(step - 1)] += part
        self._leaving = None
