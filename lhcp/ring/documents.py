"""Documents that rows are packed of: what a call sees of them. Tensors on the device, no waiting.

Rows have the numbers of their documents, which ascend along the sequence, so that one search says
how many rows are before any document, of the whole sequence and so of any of its chunks. A call's
queries and keys are then cut alike, into runs that attend to one another:

    chunk 2 of queries has the numbers 5 5 6 7, chunk 1 of keys 3 4 5 5
    own keys, causal:  cut before 6 and before 7:  queries 2 1 1, keys 2 1 1
    keys of chunk 1:   cut before 5 and before 6:  queries 0 2 2, keys 2 2 0

Chunks of queries and of keys before them share one document at most. Rows that meet no key have a
run of their own, without keys, and keys that meet no row one without rows.
"""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lhcp.comm.collectives import all_gathers
from lhcp.comm.layout import Layout
from lhcp.comm.mesh import Ranks, pack_cut, unpack_cut
from lhcp.made_once import made_once
from lhcp.operators import operator
from lhcp.ring.block.base import Bounds
from lhcp.ring.heads import kv_copies, part_of_heads
from lhcp.ring.plan import RingPlan
from lhcp.ring.schedule import Call, Step
from lhcp.ring.shape import AttentionShape, Mask


class PackedRows(NamedTuple):
    """The documents of the rows of a whole sequence, which every rank has."""

    numbers: Tensor
    """[B, Hk, S] int32 in the order of the sequence, ascending; [B, 1, S] where all heads share
    them. A batch row's count on after those of the row before."""
    limits: Tensor
    """int64 [3] on the CPU: `Mask.documents`, `longest` and `reach`, equal on all ranks: messages
    depend on them."""

    def after_exchange(self, plan: RingPlan, left: RingPlan) -> "PackedRows":
        """Return the documents of this rank's part of the kv heads, for longer chunks.

        Args:
            plan: with the heads of all; left: what it leaves once heads are exchanged.
        """
        numbers = self.numbers
        if numbers.shape[1] > 1:
            sharing = plan.sharing_ranks
            copies = kv_copies(plan.shape.num_heads, plan.shape.num_kv_heads, sharing)
            place = (plan.ranks.rank, plan.ranks.world_size, plan.ranks.node_size)
            parts = numbers.repeat_interleave(copies, 1).chunk(sharing, 1)
            numbers = parts[part_of_heads(plan.rotation, *place)]
        documents, longest, reach = self.limits.tolist()
        chunks = plan.layout.num_chunks // left.layout.num_chunks
        reach = -(-reach // chunks) if left.layout.num_chunks > 1 else 0
        return PackedRows(numbers, torch.tensor([documents * chunks, longest, reach], device="cpu"))

    def limit(self, plan: RingPlan) -> RingPlan:
        """Return a plan whose calls and messages reach as far as documents do."""
        return replace(plan, shape=_limited(plan.shape, *self.limits.tolist()))


def gather_numbers(numbers: Tensor, ranks: Ranks, layout: Layout) -> Tensor:
    """Return the numbers of all ranks' rows, in the order of the sequence, from each rank's own.

    Where they depend on a selection, no rank can compute another's. They are 4 bytes a row and kv
    head, sent once in a forward, so that neither keys nor their gradients must bring them along.

    Args:
        numbers: int32 [B, Hk, n] of this rank's rows, in layout order.

    Returns:
        int32 [B, Hk, S], the same on every rank.
    """
    if ranks.world_size == 1:
        return numbers
    gathered: Tensor = _gather_numbers(numbers, pack_cut(ranks, layout))
    return gathered


def _fake_gather(numbers: Tensor, words: str) -> Tensor:
    batch, heads, rows = numbers.shape
    return numbers.new_empty((batch, heads, rows * unpack_cut(words)[0].world_size))


@operator("gather_numbers", _fake_gather)
def _gather_numbers(numbers: Tensor, words: str) -> Tensor:
    ranks, layout, _ = unpack_cut(words)
    assert ranks.flat is not None
    own = numbers.unflatten(2, (layout.chunks_per_rank, -1)).movedim(2, 0).contiguous()
    received = ranks.receive_buffer(own, ranks.world_size * len(own), *own.shape[1:])
    all_gathers([(received, own)], ranks.flat).wait()
    owners = [layout.owner(chunk) for chunk in range(layout.num_chunks)]
    order = [rank * layout.chunks_per_rank + slot for rank, slot in owners]
    return torch.cat([received[i] for i in order], 2)


@lru_cache(maxsize=1024)
def _limited(shape: AttentionShape, documents: int, longest: int, reach: int) -> AttentionShape:
    """Return the shape of packed rows; one object for equal ones, as in `AttentionShape.unpack`."""
    return replace(shape, mask=Mask(shape.mask.causal, documents, longest, reach))


class Cuts:
    """Where documents cut the calls of one rank.

    Args:
        numbers: of `PackedRows`. shape: with their limits.
    """

    def __init__(self, numbers: Tensor, shape: AttentionShape, rank: int) -> None:
        self._shape, self._own = shape, shape.layout.chunks(rank)
        first = torch.stack([numbers[..., c * shape.chunk] for c in self._own], 2)
        within = torch.arange(shape.mask.documents + 1, dtype=torch.int32, device=numbers.device)
        values = first[..., None] + within
        before = torch.searchsorted(numbers.contiguous(), values.flatten(2), out_int32=True)
        self._before = before.view(values.shape)
        """[B, Hk, own chunks, documents + 1]: rows of the whole sequence with a smaller number than
        the first row's of each chunk, than that plus one, and so on."""
        self._made: dict[Hashable, Bounds] = {}

    @classmethod
    def of(cls, numbers: Tensor, shape: AttentionShape, rank: int) -> "Cuts":
        """Return the cuts of some documents, made once for all layers and directions."""
        return made_once(numbers, ("cuts", shape, rank), lambda: cls(numbers, shape, rank))

    def bounds(self, call: Call, step: Step) -> Bounds:
        """Return the bounds of a call's runs; keys are those of its chunks in ascending order."""
        heads = step.heads if self._before.shape[1] > 1 else None
        key = (call, heads, step.keys[slice(*call.kv)])
        if key not in self._made:
            # As in `made_once`: later calls read them in other modes.
            with torch.inference_mode(False), torch.no_grad():
                self._made[key] = self._cut(call, step)
        return self._made[key]

    def _cut(self, call: Call, step: Step) -> Bounds:
        before = self._before
        if before.shape[1] > 1:
            before = before[:, slice(*step.heads)]
        chunk, own = self._shape.chunk, self._own[slice(*call.q)]
        keys = sorted(step.keys[slice(*call.kv)])
        mine = before[:, :, slice(*call.q)]
        longest = self._shape.mask.longest
        if call.per_chunk:
            ends = torch.stack(
                [_rows_within(mine[:, :, s], _runs([c], chunk)) for s, c in enumerate(own)], 1
            )
            cut = _lay_out(ends.flatten(0, 1), chunk)
            return Bounds(cut, cut, min(longest, chunk), min(longest, chunk), before.shape[1] > 1)
        part = step.of_chunk(chunk)
        runs_of_rows, runs_of_keys = _runs(own, chunk), _runs(keys, chunk)
        if part < chunk:
            runs_of_rows = [(c * chunk, c * chunk + part) for c in own]
            runs_of_keys = [((c + 1) * chunk - part, (c + 1) * chunk) for c in keys]
        rows, num_keys = part * len(own), part * len(keys)
        if self._shape.mask.causal and not call.mask.causal:
            # What both share is the first document of the queries.
            cuts = mine[:, :, 0, :2]
        else:
            # Where the second chunk's numbers are the first one's too, it is cut already.
            cuts = mine.flatten(2).cummax(2).values
        cut = _lay_out(_rows_within(cuts, runs_of_rows), rows)
        if call.mask.causal:
            longest = min(longest, rows)
            return Bounds(cut, cut, longest, longest, before.shape[1] > 1)
        of_keys = _lay_out(_rows_within(cuts, runs_of_keys), num_keys)
        return Bounds(cut, of_keys, rows, num_keys, before.shape[1] > 1)


def _runs(chunks: Sequence[int], size: int) -> list[tuple[int, int]]:
    """Return the rows [start, stop) of ascending chunks; neighbours are one run."""
    edges = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(chunks)) if b != a + 1), len(chunks)]
    return [(chunks[a] * size, (chunks[b - 1] + 1) * size) for a, b in pairwise(edges)]


def _rows_within(before: Tensor, runs: Sequence[tuple[int, int]]) -> Tensor:
    """Return how many rows of some runs are among the first `before` of the sequence."""
    counts = [(before - start).clamp(0, stop - start) for start, stop in runs]
    return counts[0] if len(counts) == 1 else sum(counts[1:], counts[0])


def _lay_out(ends: Tensor, length: int) -> Tensor:
    """Return the bounds of runs [B, Hk, m] of rows of `length` laid end to end: the last is all."""
    ends = pad(ends.flatten(0, 1), (0, 1), value=length)
    begins = torch.arange(len(ends), dtype=torch.int32, device=ends.device)[:, None] * length
    return pad((ends + begins).flatten(), (1, 0))
