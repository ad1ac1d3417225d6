"""Keys and values come round from rank to rank; their gradients go straight back to their owners.

At distance i a rank attends to the keys of the rank i back. They come straight from there, those
alone that it may see, and parts of their gradients go straight back: nothing is forwarded, and no
sum waits for the one before it. Where a rank's keys make too small a block, a round takes several
distances at once. A round's keys travel while the one before is computed.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

from lhcp.precision import wide
from lhcp.ring.kv import KV
from lhcp.ring.merge.sum_parts import sum_parts
from lhcp.ring.parts import ring_sources
from lhcp.ring.rotation.base import CallGrads, Delivery, RotationContext
from lhcp.ring.rotation.rounds import RoundFetch, RoundReturn
from lhcp.ring.schedule import p2p_steps


class P2P:
    """`Rotation` by send and receive."""

    def __init__(self, context: RotationContext, kv: KV) -> None:
        shape = context.shape
        self._context, self._kv, self._like = context, kv, kv.k
        self._rounds = shape.rounds
        self.steps = p2p_steps(shape, context.ranks.rank, context.backward)
        self.step_bytes = shape.round_bytes
        self._splits = context.backward and shape.splits_own
        self._rounds_per_sum = len(self._rounds) if shape.holds_all_parts else 1
        self._total: KV | None = None
        self._parts: Tensor | None = None
        self._first = 0
        self._leaving: RoundReturn | None = None
        self._arrived = 0

    def deliver(self) -> Iterator[Delivery]:
        """Yield the own keys, those of each round, and the own once more where they are split."""
        fetched = self._fetch(0)
        yield Delivery(self.steps[0], self._kv)
        for i, step in enumerate(self.steps[1 : len(self._rounds) + 1]):
            with self._context.waiting(i, self._like.device):
                keys = fetched.wait()
            if i + 1 < len(self._rounds):
                fetched = self._fetch(i + 1)
            yield Delivery(step, keys)
        if self._splits:
            yield Delivery(self.steps[-1], self._kv)

    def collect(self, step: int, grads: Sequence[CallGrads]) -> None:
        """Send a round's gradients to their owners, once those before have arrived."""
        if step == 0:
            # The own keys: one call over all of them.
            self._total = grads[0].grads
            return
        if step > len(self._rounds):
            self._add_own(grads)
            return
        self._arrive()
        i = step - 1
        self._leaving = RoundReturn(self._context, grads, self._receive_views(i), self._rounds[i])

    def owned_grads(self) -> KV:
        """Return the sums of all rounds' parts and the own."""
        self._arrive()
        assert self._total is not None
        return self._total

    def _add_own(self, grads: Sequence[CallGrads]) -> None:
        """Take the gradients of the first chunk that were kept for last, beside others' parts."""
        assert self._parts is not None
        for parts, x in zip(self._parts, grads[0].grads, strict=True):
            parts[self._first - 1].copy_(x)

    def _fetch(self, i: int) -> RoundFetch:
        return RoundFetch(self._context, self._kv, self._rounds[i])

    def _sources(self, start: int, stop: int) -> tuple[tuple[int, ...], ...]:
        """Return the ranks that give parts in rounds [start, stop), for each of the own chunks."""
        context = self._context
        rank, rounds = context.ranks.rank, self._rounds[start:stop]
        return ring_sources(rank, context.layout, context.mask, rounds)

    def _receive_views(self, i: int) -> list[list[Tensor]]:
        """Return where parts of round i go: for dk and dv, by slot, [sources, B, tokens, heads, D].

        All rounds that are summed together share one tensor, slot 0 first, rounds in order:

            zigzag, rank 1 of 4, causal, chunks (1, 6), rounds of one distance each
            slot 0 is seen by ranks 2, 3, 0; slot 1 by none, none, 0
            parts: [2 3 0 | 0]; round 0 writes row 0, round 1 row 1, round 2 rows 2 and 3
        """
        start = i - i % self._rounds_per_sum
        if i == start:
            counts = [len(of_slot) for of_slot in self._sources(i, i + self._rounds_per_sum)]
            if self._splits and i + self._rounds_per_sum >= len(self._rounds):
                # The own part of the first chunk, which comes last.
                counts[0] += 1
            batch, _, *rest = self._like.shape
            row = (batch, self._context.shape.met_rows, *rest)
            self._first = counts[0]
            allocate = self._context.ranks.receive_buffer
            self._parts = allocate(self._like, 2, sum(counts), *row)
        assert self._parts is not None
        before, mine = self._sources(start, i), self._sources(i, i + 1)
        begins = [self._first * slot + len(of_slot) for slot, of_slot in enumerate(before)]
        return [
            [of_kind[b : b + len(g)] for b, g in zip(begins, mine, strict=True)]
            for of_kind in self._parts
        ]

    def _arrive(self) -> None:
        """Wait for the parts on their way; sum what is held, once that is all there is."""
        if self._leaving is None:
            return
        like, rounds = self._like, len(self._rounds)
        with self._context.waiting(rounds + self._arrived, like.device):
            self._leaving.wait()
        self._leaving = None
        self._arrived += 1
        if self._arrived % self._rounds_per_sum:
            return
        assert self._parts is not None
        dtype = like.dtype if self._arrived == rounds else wide(like.dtype)
        own, chunk = self._total, self._context.shape.chunk
        assert own is not None
        if self._parts.shape[3] == chunk:
            total = KV(*(like.new_empty(like.shape, dtype=dtype) for _ in range(2)))
        else:
            # Most rows have no parts: they are what the own are. Those that have are summed wide.
            total = own.map(lambda x: x.to(dtype).contiguous())
        sum_parts(self._parts, self._first, own, total, chunk)
        self._total, self._parts = total, None
