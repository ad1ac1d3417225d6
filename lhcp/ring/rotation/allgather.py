"""Gather all keys and values; attend to the local diagonal meanwhile, then to prefixes.

The gather goes by groups of kv heads: while one group is computed, the next one's bytes travel. In
the backward each group's gradients leave by a reduce-scatter in the same way. A rank opens one
gather a group, slot and tensor in each direction, and as many reduce-scatters in the backward.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lhcp.collectives import all_gather, reduce_scatter
from lhcp.ring.rotation.base import Grads, Trip, wide
from lhcp.ring.schedule import Step, allgather_steps


def split_heads(num_kv_heads: int, num_groups: int) -> tuple[tuple[int, int], ...]:
    """Cut kv heads into at most `num_groups` runs of equal length: [start, stop) each."""
    while num_kv_heads % num_groups:
        num_groups -= 1
    size = num_kv_heads // num_groups
    return tuple((start, start + size) for start in range(0, num_kv_heads, size))


class AllGather:
    """`Rotation` by all-gather and reduce-scatter."""

    def __init__(self, trip: Trip, k: Tensor, num_head_groups: int = 1) -> None:
        self._trip = trip
        self._like = k
        self._groups = split_heads(k.shape[2], num_head_groups)
        self.steps = allgather_steps(trip.ranks.rank, trip.layout, trip.causal, self._groups)
        self._slots = trip.layout.chunks_per_rank
        self._chunk = k.shape[1] // self._slots
        self._leaving: list[tuple[Tensor, list[dist.Work], Tensor]] = []
        self._local: Tensor | None = None

    def deliver(self, k: Tensor, v: Tensor) -> Iterator[tuple[Step, Tensor, Tensor]]:
        trip = self._trip
        first_prefix = len(self.steps) - len(self._groups)
        under_way = self._gather(k, v, 0)
        for i, step in enumerate(self.steps):
            if i < first_prefix:
                yield step, k, v
                continue
            group = i - first_prefix
            buffer, works, _ = under_way
            with trip.spans.span(trip.stage, "wait", i, k.device):
                for work in works:
                    work.wait()
            if group + 1 < len(self._groups):
                under_way = self._gather(k, v, group + 1)
            yield step, self._in_sequence(buffer[0]), self._in_sequence(buffer[1])

    def collect(self, step: int, grads: Sequence[Grads]) -> None:
        like, groups = self._like, self._groups
        if self._local is None:
            self._local = torch.zeros((2, *like.shape), dtype=wide(like.dtype), device=like.device)
        group = step - (len(self.steps) - len(groups))
        if group < 0:
            for part in grads:
                self._local[0] += part.dk
                self._local[1] += part.dv
            return
        world, heads = self._trip.ranks.world_size, groups[group][1] - groups[group][0]
        row = (like.shape[0], self._chunk, heads, like.shape[3])
        total = self._local.new_zeros((2, self._slots * world, *row))
        for part in grads:
            start, stop = part.call.kv
            for kind, grad in enumerate((part.dk, part.dv)):
                total[kind, start:stop] += grad.unflatten(1, (stop - start, -1)).movedim(1, 0)
        own = total.new_empty((2, self._slots, *row))
        works = []
        for kind in range(2):
            for slot in range(self._slots):
                source = total[kind, slot * world : (slot + 1) * world]
                works.append(
                    reduce_scatter(
                        own[kind, slot],
                        source.flatten(0, 1),
                        group=self._trip.ranks.flat,
                        async_op=True,
                    )
                )
        self._leaving.append((own, works, total))

    def home(self) -> tuple[Tensor, Tensor]:
        trip = self._trip
        assert self._local is not None
        for (start, stop), (own, works, _) in zip(self._groups, self._leaving, strict=True):
            with trip.spans.span(trip.stage, "wait_grads", start, own.device):
                for work in works:
                    work.wait()
            # Slots are stored last first: see gathered_order.
            in_order = own.flip(1) if self._slots > 1 else own
            self._local[:, :, :, start:stop] += in_order.movedim(1, 2).flatten(2, 3)
        self._leaving.clear()
        return self._local[0], self._local[1]

    def _gather(self, k: Tensor, v: Tensor, group: int) -> tuple[Tensor, list[dist.Work], Tensor]:
        """Open the gather of one group of heads, straight into the order of `gathered_order`."""
        start, stop = self._groups[group]
        world = self._trip.ranks.world_size
        packed = torch.stack((k[:, :, start:stop], v[:, :, start:stop]))
        packed = packed.unflatten(2, (self._slots, -1)).movedim(2, 1).flip(1).contiguous()
        buffer = packed.new_empty((2, self._slots * world, *packed.shape[2:]))
        works = []
        for kind in range(2):
            for slot in range(self._slots):
                into = buffer[kind, slot * world : (slot + 1) * world].flatten(0, 1)
                works.append(
                    all_gather(into, packed[kind, slot], group=self._trip.ranks.flat, async_op=True)
                )
        return buffer, works, packed

    def _in_sequence(self, chunks: Tensor) -> Tensor:
        """[chunks, B, tokens, heads, D] to [B, all tokens, heads, D]; a view when B is 1."""
        return chunks.movedim(0, 1).flatten(1, 2)
