"""Gather inside a node, ring across nodes: for a mesh of two axes, the outer across nodes.

Each rank's shard goes round the ranks in its place on every node; where it arrives, the node
gathers it. Links between nodes carry each shard once a node, as a ring does, in messages of one
shard; links inside carry the rest. While a step is computed the next node's shards are gathered and
those of the node after it are on their way. Gradients go back the same way: a node's ranks send
their parts to the rank in the owner's place, and that one sends their sum, wide, to the owner.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lhcp.comm.collectives import Works, exchange
from lhcp.ring.merge.sum_parts import sum_parts
from lhcp.ring.parts import gather_segments
from lhcp.ring.rotation import messages
from lhcp.ring.rotation.base import Grads, Trip, wide
from lhcp.ring.rotation.kv_gather import Gather, PartsHome
from lhcp.ring.rotation.messages import RingBuffers
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
        self.step_bytes = 2 * k.numel() * k.element_size() * inner.size()
        self._slots = trip.layout.chunks_per_rank
        self._own: tuple[Tensor, Tensor] | None = None
        self._parts: PartsHome | None = None
        self._sum: Works | None = None
        self._summed: list[Tensor] = []
        self._total: tuple[Tensor, Tensor] | None = None
        self._node = 0

    def deliver(self, k: Tensor, v: Tensor) -> Iterator[tuple[Step, Tensor, Tensor]]:
        trip, nodes = self._trip, self._outer.size()
        packed = RingBuffers(self._outer, torch.stack((k, v)))
        gather = self._gather(packed.current)
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
                gather = self._gather(packed.current)
            if node + 2 < nodes:
                packed.post()
            yield step, *gathered

    def collect(self, step: int, grads: Sequence[Grads]) -> None:
        if self._trip.causal and step == 0:
            self._own = (grads[0].dk, grads[0].dv)
            return
        self._pass_on()
        size = self._inner.size()
        own, keys = self._outer.rank(), (self._outer.rank() - self._node) % self._outer.size()
        queries, owners = (range(node * size, (node + 1) * size) for node in (own, keys))
        plan = gather_segments(self._trip.layout, self._trip.causal, queries, owners)
        self._parts = PartsHome(self._inner, plan, grads, self._like, self._slots)

    def home(self) -> tuple[Tensor, Tensor]:
        self._pass_on()
        self._arrive()
        assert self._total is not None
        dk, dv = (x.to(self._like.dtype) for x in self._total)
        return dk, dv

    def _gather(self, packed: Tensor) -> Gather:
        return Gather(self._inner, packed[0], packed[1], self._slots)

    def _pass_on(self) -> None:
        """Sum this node's parts and send the sum to the owner of the keys."""
        if self._parts is None:
            return
        trip, like, j = self._trip, self._like, self._node
        with trip.spans.span(trip.stage, "wait", self._outer.size() + j, like.device):
            parts = self._parts.wait()
        dtype = wide(like.dtype)
        total = like.new_empty(like.shape, dtype=dtype), like.new_empty(like.shape, dtype=dtype)
        sum_parts(parts, self._parts.first, self._own if j == 0 else None, total)
        self._parts = None
        self._node += 1
        if j == 0:
            self._total = total
            return
        self._arrive()
        nodes, own = self._outer.size(), self._outer.rank()
        self._summed = [messages.arriving(x, *x.shape) for x in total]
        self._sum = exchange(
            [(x, (own - j) % nodes) for x in total],
            [(x, (own + j) % nodes) for x in self._summed],
            self._outer,
        )

    def _arrive(self) -> None:
        """Add what another node summed for this rank's keys."""
        if self._sum is None:
            return
        trip, step = self._trip, 2 * self._outer.size() + self._node
        with trip.spans.span(trip.stage, "wait", step, self._like.device):
            self._sum.wait()
        assert self._total is not None
        for own, part in zip(self._total, self._summed, strict=True):
            own += part
        self._sum = None
