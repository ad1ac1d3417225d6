"""Gathers: k and v of all ranks of a group, and parts of their gradients on the way home."""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from lhcp.comm.collectives import Rows, all_gathers, all_to_alls
from lhcp.ring.parts import Segment
from lhcp.ring.rotation import messages
from lhcp.ring.rotation.base import Grads
from lhcp.ring.rotation.messages import chunks, joined


class Gather:
    """k and v of all ranks of a group, in the order of `gathered_order`, under way.

    Each slot of all ranks goes straight into its place; all of them are one collective.

    Args:
        k, v: [B, slots * tokens, heads, D], this rank's.
    """

    def __init__(self, group: dist.ProcessGroup, k: Tensor, v: Tensor, slots: int) -> None:
        world = group.size()
        both = [chunks(x, slots) for x in (k, v)]
        self._buffers = [messages.arriving(k, slots * world, *own[0].shape) for own in both]
        pairs = [
            (buffer[place * world : (place + 1) * world].flatten(0, 1), own[slots - 1 - place])
            for own, buffer in zip(both, self._buffers, strict=True)
            for place in range(slots)
        ]
        self._works = all_gathers(pairs, group)

    def wait(self) -> tuple[Tensor, Tensor]:
        """Return k and v, each [B, tokens of all chunks, heads, D]; views where B is 1."""
        self._works.wait()
        k, v = map(joined, self._buffers)
        return k, v


class PartsHome:
    """Gradients of gathered k and v on their way to the ranks that own the keys.

    An all-to-all a segment for dk and one for dv, started as one.

    Args:
        plan: of this gather, the same on every rank of the group.
        grads: of this rank's calls, in the order of the gather.
        like: this rank's k, [B, slots * tokens, heads, D].
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        plan: Sequence[Segment],
        grads: Sequence[Grads],
        like: Tensor,
        slots: int,
    ) -> None:
        rank, world = group.rank(), group.size()
        row = (like.shape[0], like.shape[1] // slots, *like.shape[2:])
        givers = [segment.givers(rank) for segment in plan]
        self.first = sum(len(g) for g, s in zip(givers, plan, strict=True) if s.slot == 0)
        """Parts of the first chunk; those of the second follow."""
        self._parts = messages.arriving(like, 2, sum(map(len, givers)), *row)
        exchanges: list[Rows] = []
        for kind in range(2):
            place = 0
            for segment, giving in zip(plan, givers, strict=True):
                start, stop = segment.runs[rank]
                sent = like.new_empty((0, *row))
                if start < stop:
                    part = next(part for part in grads if part.call.q == segment.q)
                    by_chunk = chunks((part.dk, part.dv)[kind], part.call.num_keys, copy=False)
                    first = (slots - 1 - segment.slot) * world - part.call.kv[0]
                    sent = by_chunk[first + start : first + stop].contiguous()
                received = self._parts[kind, place : place + len(giving)]
                rows = [int(r in giving) for r in range(world)]
                given = [int(start <= r < stop) for r in range(world)]
                exchanges.append(Rows(received, rows, sent, given))
                place += len(giving)
        self._works = all_to_alls(exchanges, group)

    def wait(self) -> Tensor:
        """Return the parts [2, givers, B, tokens of a chunk, heads, D]: `first` rows of slot 0."""
        self._works.wait()
        return self._parts
