"""Gathers: k and v of all ranks of a group, and parts of their gradients on the way back."""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from lhcp.comm.collectives import Rows, all_gathers, all_to_alls
from lhcp.ring.kv import KV
from lhcp.ring.parts import Segment
from lhcp.ring.rotation.base import CallGrads, RotationContext
from lhcp.ring.rotation.messages import join_chunks, split_chunks


class KVGather:
    """k and v of all ranks of a group, in the order of `gathered_order`, under way.

    Each slot of all ranks goes straight into its place; all of them are one collective.

    Args:
        group: the ranks, all or those of a node.
        kv: [B, slots * tokens, heads, D], this rank's.
    """

    def __init__(self, context: RotationContext, group: dist.ProcessGroup, kv: KV) -> None:
        world, slots = group.size(), context.layout.chunks_per_rank
        both = [split_chunks(x, slots) for x in kv]
        self._buffers = [
            context.ranks.receive_buffer(x, slots * world, *own[0].shape)
            for x, own in zip(kv, both, strict=True)
        ]
        pairs = [
            (buffer[i * world : (i + 1) * world].flatten(0, 1), own[slots - 1 - i])
            for own, buffer in zip(both, self._buffers, strict=True)
            for i in range(slots)
        ]
        self._works = all_gathers(pairs, group)

    def wait(self) -> KV:
        """Return k and v, each [B, tokens of all chunks, heads, D]; views where B is 1."""
        self._works.wait()
        return KV(*map(join_chunks, self._buffers))


class GatherReturn:
    """Gradients of gathered k and v on their way to the ranks that own the keys.

    An all-to-all a segment for dk and one for dv, started as one. Parts lie segment by segment:

        zigzag, rank 1 of 4, causal, owner of chunks (1, 6)
        chunk 1 was seen by the early chunks of ranks 2, 3 and the late ones of 0, 1, 2, 3; 6 by 7
        parts: [2 3 | 0 1 2 3 | 0], of which `first` = 6 are of chunk 1

    Args:
        group: the ranks that gathered.
        segments: of this gather, the same on every rank of the group.
        grads: of this rank's calls, in the order of the gather.
        like: this rank's k, [B, slots * tokens, heads, D].
    """

    def __init__(
        self,
        context: RotationContext,
        group: dist.ProcessGroup,
        segments: Sequence[Segment],
        grads: Sequence[CallGrads],
        like: Tensor,
    ) -> None:
        rank, world, slots = group.rank(), group.size(), context.layout.chunks_per_rank
        row = (like.shape[0], like.shape[1] // slots, *like.shape[2:])
        sources = [segment.sources(rank) for segment in segments]
        self.first = sum(len(g) for g, s in zip(sources, segments, strict=True) if s.slot == 0)
        """Parts of the first chunk; those of the second follow."""
        self._parts = context.ranks.receive_buffer(like, 2, sum(map(len, sources)), *row)
        exchanges: list[Rows] = []
        for kind in range(2):
            begin = 0
            for segment, from_ranks in zip(segments, sources, strict=True):
                start, stop = segment.runs[rank]
                sent = like.new_empty((0, *row))
                if start < stop:
                    mine = next(of_call for of_call in grads if of_call.call.q == segment.q)
                    by_chunk = split_chunks(mine.grads[kind], mine.call.num_keys, copy=False)
                    first = (slots - 1 - segment.slot) * world - mine.call.kv[0]
                    sent = by_chunk[first + start : first + stop].contiguous()
                received = self._parts[kind, begin : begin + len(from_ranks)]
                rows = [int(r in from_ranks) for r in range(world)]
                given = [int(start <= r < stop) for r in range(world)]
                exchanges.append(Rows(received, rows, sent, given))
                begin += len(from_ranks)
        self._works = all_to_alls(exchanges, group)

    def wait(self) -> Tensor:
        """Return the parts [2, sources, B, tokens of a chunk, heads, D]: `first` rows of slot 0."""
        self._works.wait()
        return self._parts
