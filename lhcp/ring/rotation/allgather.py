"""Gather all keys and values; attend to the local diagonal meanwhile, then to prefixes.

The gather goes by groups of kv heads: while one group is computed, the next one's bytes travel. In
the backward each group's parts of the gradients go to their owners by all-to-all in the same way.
"""

from collections.abc import Iterator, Sequence

from lhcp.ring.kv import KV
from lhcp.ring.merge.sum_parts import sum_parts
from lhcp.ring.parts import gather_segments
from lhcp.ring.rotation.base import CallGrads, Delivery, RotationContext
from lhcp.ring.rotation.kv_gather import GatherReturn, KVGather
from lhcp.ring.schedule import allgather_steps


class AllGather:
    """`Rotation` by all-gather and all-to-all."""

    def __init__(self, context: RotationContext, kv: KV) -> None:
        shape = context.shape
        self._context, self._kv, self._like = context, kv, kv.k
        self._groups = shape.head_groups
        self.step_bytes = shape.group_bytes
        self.steps = allgather_steps(shape, context.ranks.rank)
        self._own: KV | None = None
        self._leaving: GatherReturn | None = None
        self._total: KV | None = None
        self._arrived = 0

    def deliver(self) -> Iterator[Delivery]:
        """Yield the own keys under a causal mask, then all keys by groups of heads."""
        gather = self._gather(0)
        if self._context.mask.causal:
            yield Delivery(self.steps[0], self._kv)
        for group, step in enumerate(self.steps[-len(self._groups) :]):
            with self._context.waiting(group, self._like.device):
                gathered = gather.wait()
            if group + 1 < len(self._groups):
                gather = self._gather(group + 1)
            yield Delivery(step, gathered)

    def collect(self, step: int, grads: Sequence[CallGrads]) -> None:
        """Send a group's gradients to their owners, once those before have arrived."""
        context = self._context
        if context.mask.causal and step == 0:
            # The diagonal: a call over all chunks, each within itself.
            self._own = grads[0].grads
            return
        # One group's gradients are on their way at a time, so that one group's parts are in memory.
        self._arrive()
        everyone = range(context.ranks.world_size)
        segments = gather_segments(context.layout, context.mask, everyone, everyone)
        like = self._like[:, :, slice(*self._groups[self._arrived])]
        self._leaving = GatherReturn(context, context.group, segments, grads, like)

    def owned_grads(self) -> KV:
        """Return the sums of all ranks' parts and the own."""
        self._arrive()
        assert self._total is not None
        return self._total

    def _arrive(self) -> None:
        """Wait for the parts on their way and sum them into the heads of their group."""
        if self._leaving is None:
            return
        like, heads = self._like, self._groups[self._arrived]
        with self._context.waiting(len(self._groups) + self._arrived, like.device):
            parts = self._leaving.wait()
        if self._total is None:
            self._total = KV(like.new_empty(like.shape), like.new_empty(like.shape))
        own = None if self._own is None else self._own.heads(*heads)
        chunk = self._context.shape.chunk
        sum_parts(parts, self._leaving.first, own, self._total.heads(*heads), chunk)
        self._arrived += 1
        self._leaving = None

    def _gather(self, group: int) -> KVGather:
        heads = self._groups[group]
        return KVGather(self._context, self._context.group, self._kv.heads(*heads))
