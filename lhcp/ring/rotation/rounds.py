"""Rounds of a ring: k and v of some ranks' chunks, and parts of their gradients on the way back."""

from collections.abc import Sequence

from torch import Tensor

from lhcp.comm.collectives import Peered, exchange
from lhcp.ring.kv import KV
from lhcp.ring.parts import ring_route, ring_sources
from lhcp.ring.rotation.base import CallGrads, RotationContext
from lhcp.ring.rotation.messages import join_chunks, split_chunks


class RoundFetch:
    """k and v of the chunks of a round of the ring, straight from their owners, under way.

    Of each chunk its last `met_rows`.

    Args:
        kv: [B, slots * tokens, heads, D], this rank's.
        distances: of the round; keys come from as many ranks back as each says.
    """

    def __init__(self, context: RotationContext, kv: KV, distances: range) -> None:
        layout, group = context.layout, context.group
        owners, leaving = ring_route(group.rank(), layout, context.mask, distances)
        rows = context.shape.met_rows
        chunks = [split_chunks(x, layout.chunks_per_rank, copy=False) for x in kv]
        own = [by_chunk[:, :, -rows:].contiguous().unbind() for by_chunk in chunks]
        self._buffers = [
            context.ranks.receive_buffer(x, len(owners), *slots[0].shape)
            for x, slots in zip(kv, own, strict=True)
        ]
        pairs = zip(owners, *(buffer.unbind() for buffer in self._buffers), strict=True)
        incoming = [(x, owner) for owner, *pair in pairs for x in pair]
        outgoing = [(x[slot], to) for slot, to in leaving for x in own]
        self._works = exchange(outgoing, incoming, group)

    def wait(self) -> KV:
        """Return k and v, each [B, tokens of all chunks, heads, D]; views where B is 1."""
        self._works.wait()
        return KV(*map(join_chunks, self._buffers))


class RoundReturn:
    """Gradients of a round's k and v on their way to the ranks that own the keys.

    Args:
        grads: of this rank's calls, over the chunks in the order of `round_chunks`.
        parts: where others' parts of this rank's gradients go: for dk and for dv, by slot, by
            source in the order of `ring_sources` of this round.
    """

    def __init__(
        self,
        context: RotationContext,
        grads: Sequence[CallGrads],
        parts: Sequence[Sequence[Tensor]],
        distances: range,
    ) -> None:
        layout, group = context.layout, context.group
        rank = group.rank()
        owners, _ = ring_route(rank, layout, context.mask, distances)
        outgoing: list[Peered] = []
        # Calls come in any order; messages go in the order of the chunks.
        for of_call in sorted(grads, key=lambda of_call: of_call.call.kv):
            run = owners[slice(*of_call.call.kv)]
            both = [split_chunks(x, len(run), copy=False).unbind() for x in of_call.grads]
            by_chunk = zip(run, *both, strict=True)
            outgoing += [(x.contiguous(), owner) for owner, *pair in by_chunk for x in pair]
        sources = ring_sources(rank, layout, context.mask, (distances,))
        incoming: list[Peered] = []
        # Between two ranks chunks go the last first, as in `round_chunks`.
        for slot in reversed(range(layout.chunks_per_rank)):
            pairs = zip(sources[slot], *(of_kind[slot].unbind() for of_kind in parts), strict=True)
            incoming += [(x, source) for source, *pair in pairs for x in pair]
        self._works = exchange(outgoing, incoming, group)

    def wait(self) -> None:
        """Wait until the parts are there."""
        self._works.wait()
