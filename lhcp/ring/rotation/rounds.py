"""Rounds of a ring: k and v of some ranks' chunks, and parts of their gradients on the way home."""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from lhcp.collectives import Peered, exchange
from lhcp.layout import Layout
from lhcp.ring.parts import ring_givers
from lhcp.ring.rotation import messages
from lhcp.ring.rotation.base import Grads
from lhcp.ring.rotation.messages import chunks, joined
from lhcp.ring.schedule import round_chunks


class RingChunks:
    """k and v of the chunks of a round of the ring, straight from their owners, under way.

    Args:
        k, v: [B, slots * tokens, heads, D], this rank's.
        distances: of the round; keys come from as many ranks back as each says.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        causal: bool,
        distances: range,
    ) -> None:
        rank, world = group.rank(), group.size()
        own = [chunks(x, layout.chunks_per_rank) for x in (k, v)]
        mine = round_chunks(rank, layout, causal, distances)
        self._buffers = [messages.arriving(k, len(mine), *own[0].shape[1:]) for _ in own]
        incoming = [
            (buffer[i], layout.owner(chunk)[0])
            for i, chunk in enumerate(mine)
            for buffer in self._buffers
        ]
        outgoing = [
            (x[slot], to)
            for to in ((rank + distance) % world for distance in distances)
            for slot in _slots_seen(to, rank, layout, causal, distances)
            for x in own
        ]
        self._works = exchange(outgoing, incoming, group)

    def wait(self) -> tuple[Tensor, Tensor]:
        """Return k and v, each [B, tokens of all chunks, heads, D]; views where B is 1."""
        self._works.wait()
        k, v = map(joined, self._buffers)
        return k, v


class RingParts:
    """Gradients of a round's k and v on their way to the ranks that own the keys.

    Args:
        grads: of this rank's calls, over the chunks in the order of `round_chunks`.
        parts: where others' parts of this rank's gradients go: for dk and for dv, by slot, by giver
            in the order of `ring_givers` of this round.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        grads: Sequence[Grads],
        parts: Sequence[Sequence[Tensor]],
        layout: Layout,
        causal: bool,
        distances: range,
    ) -> None:
        rank = group.rank()
        outgoing: list[Peered] = []
        mine = round_chunks(rank, layout, causal, distances)
        for part in grads:
            run = mine[slice(*part.call.kv)]
            both = [chunks(x, len(run), copy=False) for x in (part.dk, part.dv)]
            outgoing += [
                (x[i].contiguous(), layout.owner(chunk)[0])
                for i, chunk in enumerate(run)
                for x in both
            ]
        givers = ring_givers(rank, layout, causal, (distances,))
        # Between two ranks chunks go the last first, as in `round_chunks`.
        incoming = [
            (of_kind[slot][i], giver)
            for slot in reversed(range(layout.chunks_per_rank))
            for i, giver in enumerate(givers[slot])
            for of_kind in parts
        ]
        self._works = exchange(outgoing, incoming, group)

    def wait(self) -> None:
        self._works.wait()


def _slots_seen(rank: int, owner: int, layout: Layout, causal: bool, distances: range) -> list[int]:
    """Slots of `owner` that `rank` fetches in a round, in the order in which they travel."""
    wanted = map(layout.owner, round_chunks(rank, layout, causal, distances))
    return [slot for other, slot in wanted if other == owner]
