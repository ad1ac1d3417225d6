"""Gather all keys and values; attend to the local diagonal meanwhile, then to prefixes.

The gather goes by groups of kv heads: while one group is computed, the next one's bytes travel. In
the backward each group's parts of the gradients go to their owners by all-to-all in the same way.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

from lhcp.ring.merge.sum_parts import sum_parts
from lhcp.ring.parts import gather_segments
from lhcp.ring.rotation.base import Grads, Trip
from lhcp.ring.rotation.kv_gather import Gather, PartsHome
from lhcp.ring.schedule import Step, allgather_steps

MIN_GROUP_BYTES = 16 * 2**20
"""A group of heads gathers at least this much: below, latency costs more than overlap gains."""

MIN_GROUP_ROWS = 4 * 132 * 128
"""Queries of a chunk x their heads in a group: four tiles for each multiprocessor of an H200. Two
cost 5% more there than all heads at once, a half of one 20%."""


def split_heads(num_kv_heads: int, num_groups: int) -> tuple[tuple[int, int], ...]:
    """Cut kv heads into at most `num_groups` runs of equal length: [start, stop) each."""
    num_groups = max(1, min(num_groups, num_kv_heads))
    while num_kv_heads % num_groups:
        num_groups -= 1
    size = num_kv_heads // num_groups
    return tuple((start, start + size) for start in range(0, num_kv_heads, size))


def head_groups(
    num_kv_heads: int, query_rows: int, gathered_bytes: int, world_size: int
) -> tuple[tuple[int, int], ...]:
    """Return the runs of kv heads that are gathered one after another.

    Args:
        query_rows: queries of a chunk x their heads x the batch.
        gathered_bytes: of all ranks' k and v, all heads.
        world_size: with few ranks the diagonal is long enough to hide a gather on its own.
    """
    most = min(query_rows // MIN_GROUP_ROWS, gathered_bytes // MIN_GROUP_BYTES, world_size // 2)
    return split_heads(num_kv_heads, most)


class AllGather:
    """`Rotation` by all-gather and all-to-all."""

    def __init__(self, trip: Trip, k: Tensor) -> None:
        self._trip, self._like = trip, k
        self._slots, world = trip.layout.chunks_per_rank, trip.ranks.world_size
        gathered_bytes = 2 * k.numel() * k.element_size() * world
        query_rows = k.shape[0] * (k.shape[1] // self._slots) * trip.num_heads
        self._groups = head_groups(k.shape[2], query_rows, gathered_bytes, world)
        self.step_bytes = gathered_bytes // len(self._groups)
        self.steps = allgather_steps(trip.ranks.rank, trip.layout, trip.causal, self._groups)
        self._own: tuple[Tensor, Tensor] | None = None
        self._leaving: PartsHome | None = None
        self._home: tuple[Tensor, Tensor] | None = None
        self._arrived = 0

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
        trip = self._trip
        if trip.causal and step == 0:
            # The diagonal: a call over all chunks, each within itself.
            self._own = (grads[0].dk, grads[0].dv)
            return
        # One group's gradients are on their way at a time, so that one group's parts are in memory.
        self._arrive()
        everyone = range(trip.ranks.world_size)
        plan = gather_segments(trip.layout, trip.causal, everyone, everyone)
        like = self._like[:, :, slice(*self._groups[self._arrived])]
        self._leaving = PartsHome(trip.group, plan, grads, like, self._slots)

    def home(self) -> tuple[Tensor, Tensor]:
        self._arrive()
        assert self._home is not None
        return self._home

    def _arrive(self) -> None:
        if self._leaving is None:
            return
        trip, like = self._trip, self._like
        step = len(self._groups) + self._arrived
        with trip.spans.span(trip.stage, "wait", step, like.device):
            parts = self._leaving.wait()
        if self._home is None:
            self._home = like.new_empty(like.shape), like.new_empty(like.shape)
        heads = slice(*self._groups[self._arrived])

        def group(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return pair[0][:, :, heads], pair[1][:, :, heads]

        own = None if self._own is None else group(self._own)
        sum_parts(parts, self._leaving.first, own, group(self._home))
        self._arrived += 1
        self._leaving = None

    def _gather(self, k: Tensor, v: Tensor, group: int) -> Gather:
        heads = slice(*self._groups[group])
        return Gather(self._trip.group, k[:, :, heads], v[:, :, heads], self._slots)
