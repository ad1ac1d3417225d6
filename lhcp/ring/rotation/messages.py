"""What the messages of rotations are made of: chunks of tensors, and tensors that go round."""

import torch.distributed as dist
from torch import Tensor

from lhcp.comm.collectives import Works, exchange
from lhcp.comm.mesh import Ranks


class RingBuffers:
    """A tensor that goes round a group: three buffers take turns, nothing is allocated on the way.

    What was current stays as it is until the exchange after the next is posted, so a step may still
    read it while the next one starts.
    """

    def __init__(self, ranks: Ranks, group: dist.ProcessGroup, own: Tensor) -> None:
        self._ranks, self._group = ranks, group
        self._buffers = [own]
        self._turn = 0
        self._works: Works | None = None

    @property
    def current(self) -> Tensor:
        """What came last; at first the own."""
        return self._buffers[self._turn]

    def post(self) -> None:
        """Send `current` on and start to receive the previous rank's; on one rank, keep it."""
        if self._group.size() == 1:
            return
        if len(self._buffers) < 3:
            own = self._buffers[0]
            self._buffers.append(self._ranks.receive_buffer(own, *own.shape))
        into = self._buffers[(self._turn + 1) % 3]
        rank, world = self._group.rank(), self._group.size()
        to, back = (rank + 1) % world, (rank - 1) % world
        self._works = exchange([(self.current, to)], [(into, back)], self._group)

    def arrive(self) -> None:
        """Wait for the exchange that was posted; `current` is what came."""
        if self._group.size() == 1:
            return
        assert self._works is not None, "arrive() without post()"
        self._works.wait()
        self._works = None
        self._turn = (self._turn + 1) % 3


def split_chunks(x: Tensor, count: int, copy: bool = True) -> Tensor:
    """View [B, count * tokens, heads, D] as [count, B, tokens, heads, D], each chunk contiguous.

    Args:
        copy: make it contiguous where it is not; else the caller does, for what it takes of it.
    """
    by_chunk = x.unflatten(1, (count, -1)).movedim(1, 0)
    return by_chunk.contiguous() if copy else by_chunk


def join_chunks(by_chunk: Tensor) -> Tensor:
    """View [count, B, tokens, heads, D] as [B, count * tokens, heads, D]; a copy if B is not 1."""
    return by_chunk.movedim(0, 1).flatten(1, 2)
