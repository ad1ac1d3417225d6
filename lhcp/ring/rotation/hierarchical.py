"""Gather inside a node, ring across nodes: for a mesh of two axes, the outer across nodes.

Each rank's shard goes round the ranks with its index on every node; where it arrives, the node
gathers it. Links between nodes carry each shard once a node, as a ring does, in messages of one
shard; links inside carry the rest. While a step is computed the next node's shards are gathered and
those of the node after it are on their way. Gradients go back the same way: a node's ranks send
their parts to the rank with the owner's index, and that one sends their sum, wide, to the owner.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lhcp.comm.collectives import Works, exchange
from lhcp.precision import wide
from lhcp.ring.kv import KV
from lhcp.ring.merge.sum_parts import sum_parts
from lhcp.ring.parts import gather_segments
from lhcp.ring.rotation.base import CallGrads, Delivery, RotationContext
from lhcp.ring.rotation.kv_gather import GatherReturn, KVGather
from lhcp.ring.rotation.messages import RingBuffers
from lhcp.ring.schedule import hierarchical_steps


class Hierarchical:
    """`Rotation` by a ring of gathers."""

    def __init__(self, context: RotationContext, kv: KV) -> None:
        outer, inner = context.ranks.outer, context.ranks.inner
        assert outer is not None and inner is not None
        self._context, self._outer, self._inner = context, outer, inner
        self._kv, self._like = kv, kv.k
        self.steps = hierarchical_steps(context.shape, context.ranks.rank)
        self.step_bytes = context.shape.node_bytes
        self._own: KV | None = None
        self._parts: GatherReturn | None = None
        self._sum: Works | None = None
        self._summed: list[Tensor] = []
        self._total: KV | None = None
        self._node = 0

    def deliver(self) -> Iterator[Delivery]:
        """Yield the own keys under a causal mask, then those of this node, then node by node."""
        context, nodes = self._context, self._outer.size()
        packed = RingBuffers(context.ranks, self._outer, torch.stack(self._kv))
        gather = self._gather(packed.current)
        if nodes > 1:
            packed.post()
        if context.mask.causal:
            yield Delivery(self.steps[0], self._kv)
        for node, step in enumerate(self.steps[-nodes:]):
            with context.waiting(node, self._like.device):
                gathered = gather.wait()
                if node + 1 < nodes:
                    packed.arrive()
            if node + 1 < nodes:
                gather = self._gather(packed.current)
            if node + 2 < nodes:
                packed.post()
            yield Delivery(step, gathered)

    def collect(self, step: int, grads: Sequence[CallGrads]) -> None:
        """Send a node's gradients to the ranks that sum them, once those before have arrived."""
        context = self._context
        if context.mask.causal and step == 0:
            self._own = grads[0].grads
            return
        self._pass_on()
        size = self._inner.size()
        own, keys = self._outer.rank(), (self._outer.rank() - self._node) % self._outer.size()
        queries, owners = (range(node * size, (node + 1) * size) for node in (own, keys))
        segments = gather_segments(context.layout, context.mask, queries, owners)
        self._parts = GatherReturn(context, self._inner, segments, grads, self._like)

    def owned_grads(self) -> KV:
        """Return the sums of all nodes' sums and the own."""
        self._pass_on()
        self._arrive()
        assert self._total is not None
        return self._total.map(lambda x: x.to(self._like.dtype))

    def _gather(self, packed: Tensor) -> KVGather:
        return KVGather(self._context, self._inner, KV(packed[0], packed[1]))

    def _pass_on(self) -> None:
        """Sum this node's parts and send the sum to the owner of the keys."""
        if self._parts is None:
            return
        like, j = self._like, self._node
        with self._context.waiting(self._outer.size() + j, like.device):
            parts = self._parts.wait()
        dtype = wide(like.dtype)
        total = KV(*(like.new_empty(like.shape, dtype=dtype) for _ in range(2)))
        grads, chunk = self._own if j == 0 else None, self._context.shape.chunk
        sum_parts(parts, self._parts.first, grads, total, chunk)
        self._parts = None
        self._node += 1
        if j == 0:
            self._total = total
            return
        self._arrive()
        nodes, own = self._outer.size(), self._outer.rank()
        self._summed = [self._context.ranks.receive_buffer(x, *x.shape) for x in total]
        self._sum = exchange(
            [(x, (own - j) % nodes) for x in total],
            [(x, (own + j) % nodes) for x in self._summed],
            self._outer,
        )

    def _arrive(self) -> None:
        """Add what another node summed for this rank's keys."""
        if self._sum is None:
            return
        with self._context.waiting(2 * self._outer.size() + self._node, self._like.device):
            self._sum.wait()
        assert self._total is not None
        for own, part in zip(self._total, self._summed, strict=True):
            own += part
        self._sum = None
