"""The messages that rotations are made of: exchanges, rings, gathers, parts on their way home."""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from lhcp.collectives import all_gather, all_to_all
from lhcp.ring.parts import Segment
from lhcp.ring.rotation.base import Grads


def arriving(like: Tensor, *shape: int) -> Tensor:
    """Memory that a message will fill."""
    return like.new_empty(shape)


class Exchange:
    """Tensors to the rank `distance` further on, and others from the one as far back, under way."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        outgoing: Sequence[Tensor],
        incoming: Sequence[Tensor],
        distance: int = 1,
    ) -> None:
        rank, world = group.rank(), group.size()
        to, back = (rank + distance) % world, (rank - distance) % world
        self.incoming = incoming
        self._outgoing = outgoing  # must outlive the messages
        # Receives first: after a send, gloo's link between two ranks runs one way at a time.
        ops = [dist.P2POp(dist.irecv, x, group=group, group_peer=back) for x in incoming]
        ops += [dist.P2POp(dist.isend, x, group=group, group_peer=to) for x in outgoing]
        self._work = dist.batch_isend_irecv(ops) if ops else []

    def wait(self) -> None:
        for work in self._work:
            work.wait()


class RingBuffers:
    """A tensor that goes round a group: three buffers take turns, nothing is allocated on the way.

    What was current stays as it is until the exchange after the next is posted, so a step may still
    read it while the next one starts.
    """

    def __init__(self, group: dist.ProcessGroup, own: Tensor) -> None:
        self._group = group
        self._buffers = [own]
        self._turn = 0
        self._exchange: Exchange | None = None

    @property
    def current(self) -> Tensor:
        return self._buffers[self._turn]

    def post(self) -> None:
        """Send `current` on and start to receive the previous rank's; on one rank, keep it."""
        if self._group.size() == 1:
            return
        if len(self._buffers) < 3:
            own = self._buffers[0]
            self._buffers.append(arriving(own, *own.shape))
        into = self._buffers[(self._turn + 1) % 3]
        self._exchange = Exchange(self._group, [self.current], [into])

    def arrive(self) -> None:
        """Wait for the exchange that was posted; `current` is what came."""
        if self._group.size() == 1:
            return
        assert self._exchange is not None, "arrive() without post()"
        self._exchange.wait()
        self._exchange = None
        self._turn = (self._turn + 1) % 3


class Gather:
    """k and v of all ranks of a group, in the order of `gathered_order`, under way.

    Each slot of all ranks is one collective, straight into its place.

    Args:
        k, v: [B, slots * tokens, heads, D], this rank's.
    """

    def __init__(self, group: dist.ProcessGroup, k: Tensor, v: Tensor, slots: int) -> None:
        world = group.size()
        self._own = [chunks(x, slots) for x in (k, v)]  # must outlive the messages
        self._buffers = [arriving(k, slots * world, *own[0].shape) for own in self._own]
        self._work = [
            all_gather(
                buffer[place * world : (place + 1) * world].flatten(0, 1),
                own[slots - 1 - place],
                group=group,
                async_op=True,
            )
            for own, buffer in zip(self._own, self._buffers, strict=True)
            for place in range(slots)
        ]

    def wait(self) -> tuple[Tensor, Tensor]:
        """Return k and v, each [B, tokens of all chunks, heads, D]; views where B is 1."""
        for work in self._work:
            work.wait()
        k, v = (buffer.movedim(0, 1).flatten(1, 2) for buffer in self._buffers)
        return k, v


class PartsHome:
    """Gradients of gathered k and v on their way to the ranks that own the keys.

    One all-to-all a segment, for dk and for dv.

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
        self._parts = arriving(like, 2, sum(map(len, givers)), *row)
        self._sent: list[Tensor] = []  # must outlive the messages
        self._work = []
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
                self._sent.append(sent)
                work = all_to_all(
                    self._parts[kind, place : place + len(giving)],
                    sent,
                    [int(r in giving) for r in range(world)],
                    [int(start <= r < stop) for r in range(world)],
                    group,
                )
                if work is not None:
                    self._work.append(work)
                place += len(giving)

    def wait(self) -> Tensor:
        """Return the parts [2, givers, B, tokens of a chunk, heads, D]: `first` rows of slot 0."""
        for work in self._work:
            work.wait()
        self._sent.clear()
        return self._parts


def chunks(x: Tensor, count: int, copy: bool = True) -> Tensor:
    """View [B, count * tokens, heads, D] as [count, B, tokens, heads, D], each chunk contiguous.

    Args:
        copy: make it contiguous where it is not; else the caller does, for what it takes of it.
    """
    by_chunk = x.unflatten(1, (count, -1)).movedim(1, 0)
    return by_chunk.contiguous() if copy else by_chunk
