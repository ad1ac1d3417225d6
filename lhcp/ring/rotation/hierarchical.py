"""Gather inside a node, ring across nodes: for a mesh of two axes, the outer across nodes.

Each rank's shard goes round the ranks in its place on every node; where it arrives, the node
gathers it. Links between nodes carry each shard once a node, as a ring does, in messages of one
shard; links inside carry the rest. While a step is computed the next node's shards are gathered and
those of the node after it are on their way.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lhcp.ring.rotation.base import Grads, Trip, add_chunks, zeros_wide
from lhcp.ring.rotation.messages import Gather, ReduceScatter, RingBuffers, pack_chunks
from lhcp.ring.schedule import Step, hierarchical_steps


class Hierarchical:
    """`Rotation` by a ring of gathers."""

    def __init__(self, trip: Trip, k: Tensor) -> None:
        outer, inner = trip.ranks.outer, trip.ranks.inner
        assert outer is not None and inner is not None
        self._trip, self._like, self._outer, self._inner = trip, k, outer, inner
        self.steps = hierarchical_steps(
            trip.ranks.rank, trip.layout, trip.causal, k.shape[2], inner.size()
        )
        self._slots = trip.layout.chunks_per_rank
        self._local = None if trip.causal else zeros_wide(k, 2, *k.shape)
        self._leaving: ReduceScatter | None = None
        self._grads: RingBuffers | None = None

    def deliver(self, k: Tensor, v: Tensor) -> Iterator[tuple[Step, Tensor, Tensor]]:
        trip, nodes = self._trip, self._outer.size()
        packed = RingBuffers(self._outer, pack_chunks(k, v, self._slots))
        gather = Gather(self._inner, packed.current)
        if nodes > 1:
            packed.post()
        if trip.causal:
            yield self.steps[0], k, v
        for node, step in enumerate(self.steps[-nodes:]):
            with trip.spans.span(trip.stage, "wait", node, k.device):
                gathered = gather.wait()
                if node + 1 < nodes:
                    packed.arrive()
            if node + 1 < nodes:
                # A copy: the gather must not read the buffer that the next exchange fills.
                gather = Gather(self._inner, packed.current.clone())
            if node + 2 < nodes:
                packed.post()
            yield step, *gathered

    def collect(self, step: int, grads: Sequence[Grads]) -> None:
        if self._local is None:
            self._local = torch.stack((grads[0].dk, grads[0].dv))
            return
        like, chunks = self._like, self._slots * self._inner.size()
        chunk = like.shape[1] // self._slots
        total = zeros_wide(like, 2, chunks, like.shape[0], chunk, *like.shape[2:])
        add_chunks(total, grads)
        self._pass_on(step)
        self._leaving = ReduceScatter(self._inner, total)

    def home(self) -> tuple[Tensor, Tensor]:
        self._pass_on(len(self.steps))
        trip = self._trip
        assert self._grads is not None and self._local is not None
        with trip.spans.span(trip.stage, "wait", len(self.steps) + 1, self._like.device):
            self._grads.arrive()
        dk, dv = self._grads.current.add_(self._local)
        return dk, dv

    def _pass_on(self, step: int) -> None:
        """Add this node's part to the sum that goes round, and send it on."""
        if self._leaving is None:
            return
        trip = self._trip
        with trip.spans.span(trip.stage, "wait", step, self._like.device):
            part = self._leaving.wait()
            if self._grads is not None:
                self._grads.arrive()
        if self._grads is None:
            self._grads = RingBuffers(self._outer, part.contiguous())
        else:
            self._grads.current.add_(part)
        self._grads.post()
