"""Gather all keys and values; attend to the local diagonal meanwhile, then to prefixes.

The gather goes by groups of kv heads: while one group is computed, the next one's bytes travel. In
the backward each group's gradients leave by a reduce-scatter in the same way. A rank opens one
gather a group, slot and tensor in each direction, and as many reduce-scatters in the backward.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lhcp.ring.rotation.base import Grads, Trip, add_chunks, zeros_wide
from lhcp.ring.rotation.messages import Gather, ReduceScatter, pack_chunks
from lhcp.ring.schedule import Step, allgather_steps

MIN_GROUP_BYTES = 16 * 2**20
"""A group of heads gathers at least this much: below, latency costs more than overlap gains."""

MIN_GROUP_ROWS = 132 * 128
"""kv heads x query rows of a chunk in a group: fewer leave multiprocessors without work."""


def split_heads(num_kv_heads: int, num_groups: int) -> tuple[tuple[int, int], ...]:
    """Cut kv heads into at most `num_groups` runs of equal length: [start, stop) each."""
    num_groups = max(1, min(num_groups, num_kv_heads))
    while num_kv_heads % num_groups:
        num_groups -= 1
    size = num_kv_heads // num_groups
    return tuple((start, start + size) for start in range(0, num_kv_heads, size))


def head_groups(num_kv_heads: int, chunk: int, gathered_bytes: int) -> tuple[tuple[int, int], ...]:
    """Return the runs of kv heads that are gathered one after another.

    Args:
        chunk: tokens of a chunk. gathered_bytes: of all ranks' k and v, all heads.
    """
    by_rows = num_kv_heads * chunk // MIN_GROUP_ROWS
    return split_heads(num_kv_heads, min(gathered_bytes // MIN_GROUP_BYTES, by_rows))


class AllGather:
    """`Rotation` by all-gather and reduce-scatter."""

    def __init__(self, trip: Trip, k: Tensor) -> None:
        self._trip, self._like = trip, k
        gathered_bytes = 2 * k.numel() * k.element_size() * trip.ranks.world_size
        chunk = k.shape[1] // trip.layout.chunks_per_rank
        self._groups = head_groups(k.shape[2], chunk, gathered_bytes)
        self.steps = allgather_steps(trip.ranks.rank, trip.layout, trip.causal, self._groups)
        self._slots = trip.layout.chunks_per_rank
        self._leaving: ReduceScatter | None = None
        self._parts: list[Tensor] = []
        self._local = None if trip.causal else zeros_wide(k, 2, *k.shape)

    def deliver(self, k: Tensor, v: Tensor) -> Iterator[tuple[Step, Tensor, Tensor]]:
        trip = self._trip
        gather = self._gather(k, v, 0)
        if trip.causal:
            yield self.steps[0], k, v
        for group, step in enumerate(self.steps[-len(self._groups) :]):
            with trip.spans.span(trip.stage, "wait", group, k.device):
                gathered = gather.wait()
            if group + 1 < len(self._groups):
                gather = self._gather(k, v, group + 1)
            yield step, *gathered

    def collect(self, step: int, grads: Sequence[Grads]) -> None:
        if self._local is None:
            # The diagonal: a call over all chunks, each within itself.
            self._local = torch.stack((grads[0].dk, grads[0].dv))
            return
        like, heads = self._like, self._groups[0][1] - self._groups[0][0]
        chunks = self._trip.layout.num_chunks
        chunk = like.shape[1] // self._slots
        total = zeros_wide(like, 2, chunks, like.shape[0], chunk, heads, like.shape[3])
        add_chunks(total, grads)
        # One group's gradients are on their way at a time, so that one group's sum is in memory.
        self._arrive()
        self._leaving = ReduceScatter(self._trip.group, total)

    def home(self) -> tuple[Tensor, Tensor]:
        self._arrive()
        assert self._local is not None
        dk, dv = torch.cat(self._parts, 3).add_(self._local)
        return dk, dv

    def _arrive(self) -> None:
        if self._leaving is None:
            return
        trip, step = self._trip, len(self._groups) + len(self._parts)
        with trip.spans.span(trip.stage, "wait", step, self._like.device):
            self._parts.append(self._leaving.wait())

    def _gather(self, k: Tensor, v: Tensor, group: int) -> Gather:
        heads = slice(*self._groups[group])
        return Gather(self._trip.group, pack_chunks(k[:, :, heads], v[:, :, heads], self._slots))
