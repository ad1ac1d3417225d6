"""The ring: keys and values go to the next rank at every step, their gradients along behind them.

k and v travel packed in one message. Two buffers take turns, and the next exchange is posted before
the step is computed. A rank sends W-1 messages in the forward and 2W-1 in the backward.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lhcp.mesh import Ranks
from lhcp.ring.rotation.base import Grads, Trip, wide
from lhcp.ring.schedule import Step, p2p_steps


class Exchange:
    """One message to the next rank and one from the previous, under way."""

    def __init__(self, ranks: Ranks, outgoing: Tensor, incoming: Tensor) -> None:
        rank, world = ranks.rank, ranks.world_size
        self._work = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, outgoing, group=ranks.flat, group_peer=(rank + 1) % world),
                dist.P2POp(dist.irecv, incoming, group=ranks.flat, group_peer=(rank - 1) % world),
            ]
        )

    def wait(self) -> None:
        for work in self._work:
            work.wait()


class P2P:
    """`Rotation` by send and receive between neighbours."""

    def __init__(self, trip: Trip, k: Tensor) -> None:
        self._trip = trip
        self.steps = p2p_steps(trip.ranks.rank, trip.layout, trip.causal, k.shape[2])
        self._like = k
        self._grads: Tensor | None = None
        self._arriving: Tensor | None = None
        self._homeward: Exchange | None = None

    def deliver(self, k: Tensor, v: Tensor) -> Iterator[tuple[Step, Tensor, Tensor]]:
        trip = self._trip
        current = torch.stack((k, v))
        spare = torch.empty_like(current)
        for i, step in enumerate(self.steps):
            last = i + 1 == len(self.steps)
            exchange = None if last else Exchange(trip.ranks, current, spare)
            yield step, current[0], current[1]
            if exchange is not None:
                with trip.spans.span(trip.stage, "wait", i, k.device):
                    exchange.wait()
                current, spare = spare, current

    def collect(self, step: int, grads: Sequence[Grads]) -> None:
        trip = self._trip
        if self._grads is None or self._arriving is None:
            shape, dtype = (2, *self._like.shape), wide(self._like.dtype)
            self._grads = torch.zeros(shape, dtype=dtype, device=self._like.device)
            self._arriving = torch.empty_like(self._grads)
        else:
            self._arrive(step)
        size = self._like.shape[1] // trip.layout.chunks_per_rank
        for part in grads:
            run = slice(part.call.kv[0] * size, part.call.kv[1] * size)
            self._grads[0][:, run] += part.dk
            self._grads[1][:, run] += part.dv
        self._homeward = Exchange(trip.ranks, self._grads, self._arriving)

    def home(self) -> tuple[Tensor, Tensor]:
        self._arrive(len(self.steps))
        assert self._grads is not None
        return self._grads[0], self._grads[1]

    def _arrive(self, step: int) -> None:
        assert self._homeward is not None
        trip = self._trip
        with trip.spans.span(trip.stage, "wait_grads", step, self._like.device):
            self._homeward.wait()
        self._grads, self._arriving = self._arriving, self._grads
