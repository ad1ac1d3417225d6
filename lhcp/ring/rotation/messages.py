"""The messages that rotations are made of: neighbour exchanges, gathers, travelling gradients."""

import torch
import torch.distributed as dist
from torch import Tensor

from lhcp.collectives import all_gather, reduce_scatter


class Exchange:
    """One message to the next rank of a group and one from the previous, under way."""

    def __init__(self, group: dist.ProcessGroup, outgoing: Tensor, incoming: Tensor) -> None:
        rank, world = group.rank(), group.size()
        # The receive first: after a send, gloo's link between two ranks runs one way at a time.
        self._work = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.irecv, incoming, group=group, group_peer=(rank - 1) % world),
                dist.P2POp(dist.isend, outgoing, group=group, group_peer=(rank + 1) % world),
            ]
        )

    def wait(self) -> None:
        for work in self._work:
            work.wait()


class RingBuffers:
    """A tensor that goes round a group: two buffers take turns, nothing is allocated on the way."""

    def __init__(self, group: dist.ProcessGroup, own: Tensor) -> None:
        self._group = group
        self.current = own
        self._spare = torch.empty_like(own)
        self._alone = group.size() == 1
        self._exchange: Exchange | None = None

    def post(self) -> None:
        """Send `current` on and start to receive the previous rank's; on one rank, keep it."""
        if self._alone:
            return
        self._exchange = Exchange(self._group, self.current, self._spare)

    def arrive(self) -> None:
        """Wait for the exchange that was posted; `current` is what came."""
        if self._alone:
            return
        assert self._exchange is not None, "arrive() without post()"
        self._exchange.wait()
        self._exchange = None
        self.current, self._spare = self._spare, self.current


class Gather:
    """k and v of all ranks of a group, in the order of `gathered_order`, under way.

    Args:
        packed: [2, slots, B, tokens of a chunk, heads, D], the last slot first (`pack_chunks`).
    """

    def __init__(self, group: dist.ProcessGroup, packed: Tensor) -> None:
        world, slots = group.size(), packed.shape[1]
        self._packed = packed  # must outlive the messages
        self._buffer = packed.new_empty((2, slots * world, *packed.shape[2:]))
        self._work = [
            all_gather(
                self._buffer[kind, slot * world : (slot + 1) * world].flatten(0, 1),
                packed[kind, slot],
                group=group,
                async_op=True,
            )
            for kind in range(2)
            for slot in range(slots)
        ]

    def wait(self) -> tuple[Tensor, Tensor]:
        """Return k and v, each [B, tokens of all chunks, heads, D]; views where B is 1."""
        for work in self._work:
            work.wait()
        k, v = (chunks.movedim(0, 1).flatten(1, 2) for chunks in self._buffer)
        return k, v


class ReduceScatter:
    """Gradients of gathered k and v on their way to the ranks that own them.

    Args:
        total: [2, slots * world, B, tokens of a chunk, heads, D], wide, in the gather's order.
    """

    def __init__(self, group: dist.ProcessGroup, total: Tensor) -> None:
        world = group.size()
        slots = total.shape[1] // world
        self._total = total  # must outlive the messages
        self._own = total.new_empty((2, slots, *total.shape[2:]))
        self._work = [
            reduce_scatter(
                self._own[kind, slot],
                total[kind, slot * world : (slot + 1) * world].flatten(0, 1),
                group=group,
                async_op=True,
            )
            for kind in range(2)
            for slot in range(slots)
        ]

    def wait(self) -> Tensor:
        """Return dk and dv of this rank's tokens, packed: [2, B, tokens, heads, D]."""
        for work in self._work:
            work.wait()
        return self._own.flip(1).movedim(1, 2).flatten(2, 3)


def pack_chunks(k: Tensor, v: Tensor, slots: int) -> Tensor:
    """Pack k and v [B, slots * tokens, heads, D] as [2, slots, B, tokens, heads, D].

    The last slot comes first. The copy is also what makes a run of heads contiguous.
    """
    halves = [x.unflatten(1, (slots, -1)).movedim(1, 0).flip(0) for x in (k, v)]
    return torch.stack(halves)
