"""The ring: keys and values come round from rank to rank; their gradients go straight home.

At distance i a rank attends to the keys of the rank i back. They come straight from there, those
alone that it may see, and parts of their gradients go straight back: nothing is forwarded, and no
sum waits for the one before it. Where a rank's keys make too small a block, a round takes several
distances at once. A round's keys travel while the one before is computed.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

from lhcp.ring.merge.sum_parts import sum_parts
from lhcp.ring.parts import ring_givers
from lhcp.ring.rotation import messages
from lhcp.ring.rotation.base import HELD_BYTES, Grads, Trip, wide
from lhcp.ring.rotation.rounds import RingChunks, RingParts
from lhcp.ring.schedule import Step, p2p_steps, ring_rounds


def holds_all_parts(world_size: int, kv_bytes: int) -> bool:
    """Whether parts of all rounds are summed at once; else each round's are when they have come.

    Args:
        kv_bytes: of one rank's k and v, and so of one rank's parts for another at most.
    """
    return (world_size - 1) * kv_bytes <= HELD_BYTES


class P2P:
    """`Rotation` by send and receive."""

    def __init__(self, trip: Trip, k: Tensor) -> None:
        self._trip, self._like = trip, k
        batch, tokens = k.shape[:2]
        world, self._chunk = trip.ranks.world_size, tokens // trip.layout.chunks_per_rank
        pairs = batch * tokens * self._chunk * trip.num_heads
        self._rounds = ring_rounds(world, pairs)
        self.steps = p2p_steps(
            trip.ranks.rank, trip.layout, trip.causal, k.shape[2], self._rounds, trip.backward
        )
        kv_bytes = 2 * k.numel() * k.element_size()
        self.step_bytes = max(map(len, self._rounds)) * kv_bytes
        held = holds_all_parts(world, kv_bytes)
        self._rounds_per_sum = len(self._rounds) if held else 1
        self._total: tuple[Tensor, Tensor] | None = None
        self._parts: Tensor | None = None
        self._first = 0
        self._leaving: RingParts | None = None
        self._arrived = 0

    def deliver(self, k: Tensor, v: Tensor) -> Iterator[tuple[Step, Tensor, Tensor]]:
        trip = self._trip
        fetched = self._fetch(k, v, 0)
        yield self.steps[0], k, v
        for i, step in enumerate(self.steps[1:]):
            with trip.spans.span(trip.stage, "wait", i, k.device):
                keys = fetched.wait()
            if i + 1 < len(self._rounds):
                fetched = self._fetch(k, v, i + 1)
            yield step, *keys

    def collect(self, step: int, grads: Sequence[Grads]) -> None:
        if step == 0:
            # The own keys: one call over all of them.
            self._total = (grads[0].dk, grads[0].dv)
            return
        self._arrive()
        trip = self._trip
        self._leaving = RingParts(
            trip.group,
            grads,
            self._places(step - 1),
            trip.layout,
            trip.causal,
            self._rounds[step - 1],
        )

    def home(self) -> tuple[Tensor, Tensor]:
        self._arrive()
        assert self._total is not None
        return self._total

    def _fetch(self, k: Tensor, v: Tensor, i: int) -> RingChunks:
        trip = self._trip
        return RingChunks(trip.group, k, v, trip.layout, trip.causal, self._rounds[i])

    def _givers(self, start: int, stop: int) -> tuple[tuple[int, ...], ...]:
        """The ranks that give parts in rounds [start, stop), for each of this rank's chunks."""
        trip = self._trip
        return ring_givers(trip.ranks.rank, trip.layout, trip.causal, self._rounds[start:stop])

    def _places(self, i: int) -> list[list[Tensor]]:
        """Where parts of round i go: for dk and dv, by slot, [givers, B, tokens, heads, D]."""
        start = i - i % self._rounds_per_sum
        if i == start:
            counts = [len(of_slot) for of_slot in self._givers(i, i + self._rounds_per_sum)]
            shape = (self._like.shape[0], self._chunk, *self._like.shape[2:])
            self._first = counts[0]
            self._parts = messages.arriving(self._like, 2, sum(counts), *shape)
        assert self._parts is not None
        before, mine = self._givers(start, i), self._givers(i, i + 1)
        begins = [self._first * slot + len(of_slot) for slot, of_slot in enumerate(before)]
        return [
            [of_kind[b : b + len(g)] for b, g in zip(begins, mine, strict=True)]
            for of_kind in self._parts
        ]

    def _arrive(self) -> None:
        """Wait for the parts on their way; sum what is held, once that is all there is."""
        if self._leaving is None:
            return
        trip, like = self._trip, self._like
        step = len(self._rounds) + self._arrived
        with trip.spans.span(trip.stage, "wait", step, like.device):
            self._leaving.wait()
        self._leaving = None
        self._arrived += 1
        if self._arrived % self._rounds_per_sum:
            return
        assert self._parts is not None
        last = self._arrived == len(self._rounds)
        dtype = like.dtype if last else wide(like.dtype)
        total = like.new_empty(like.shape, dtype=dtype), like.new_empty(like.shape, dtype=dtype)
        sum_parts(self._parts, self._first, self._total, total)
        self._total, self._parts = total, None
