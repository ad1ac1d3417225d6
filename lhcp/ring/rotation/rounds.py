"""Rounds of a ring: k and v of some ranks' chunks, and parts of their gradients on the way home."""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from lhcp.comm.collectives import Peered, exchange
from lhcp.comm.layout import Layout
from lhcp.ring.parts import ring_givers, ring_route
from lhcp.ring.rotation import messages
from lhcp.ring.rotation.base import Grads
from lhcp.ring.rotation.messages import chunks, joined


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
        owners, leaving = ring_route(group.rank(), layout, causal, distances)
        own = [chunks(x, layout.chunks_per_rank).unbind() for x in (k, v)]
        self._buffers = [messages.arriving(k, len(owners), *own[0][0].shape) for _ in own]
        places = zip(owners, *(buffer.unbind() for buffer in self._buffers), strict=True)
        incoming = [(x, owner) for owner, *pair in places for x in pair]
        outgoing = [(x[slot], to) for slot, to in leaving for x in own]
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
        owners, _ = ring_route(rank, layout, causal, distances)
        outgoing: list[Peered] = []
        # Calls come in any order; messages go in the order of the chunks.
        for part in sorted(grads, key=lambda part: part.call.kv):
            run = owners[slice(*part.call.kv)]
            both = [chunks(x, len(run), copy=False).unbind() for x in (part.dk, part.dv)]
            by_chunk = zip(run, *both, strict=True)
            outgoing += [(x.contiguous(), owner) for owner, *pair in by_chunk for x in pair]
        givers = ring_givers(rank, layout, causal, (distances,))
        incoming: list[Peered] = []
        # Between two ranks chunks go the last first, as in `round_chunks`.
        for slot in reversed(range(layout.chunks_per_rank)):
            places = zip(givers[slot], *(of_kind[slot].unbind() for of_kind in parts), strict=True)
            incoming += [(x, giver) for giver, *pair in places for x in pair]
        self._works = exchange(outgoing, incoming, group)

    def wait(self) -> None:
        self._works.wait()
