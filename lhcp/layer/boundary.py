"""What chunks owe each other: the last entries of a chunk also serve the first tokens of the next.

Each chunk's last entry of levels 1 to L-1 travels as a row, [L-1, H, D] a chunk, and the gradient
of those rows travels back the same way. Every rank sends as many messages, in the same order: slot
0 to the next rank and, with zigzag, slot 1 to the previous one, round the circle. What arrives for
the sequence's first chunk, or where a neighbour is this rank itself, is replaced:

    zigzag, W = 4     chunk 0>1>2>3>4>5>6>7      chunk 3 to 4 stays on rank 3
                      rank  0 1 2 3 3 2 1 0
"""

import torch
from torch import Tensor

from lhcp.comm.collectives import Works, exchange
from lhcp.comm.layout import Layout
from lhcp.comm.mesh import Ranks
from lhcp.timing import Spans


class BoundaryExchange:
    """One exchange under way: `start` in the constructor, then `wait` once."""

    def __init__(
        self, rows: Tensor, ranks: Ranks, layout: Layout, *, back: bool, spans: Spans
    ) -> None:
        """Post the messages.

        Args:
            rows: [B, num_chunks, L-1, H, D]. Forward: what each chunk owes the next one. Back: the
                gradient of each chunk's halo, for the chunk before.
            back: the direction of the gradients.
        """
        self._rows, self._ranks, self._layout, self._back = rows, ranks, layout, back
        self._spans = spans
        self._works: Works | None = None
        if ranks.world_size == 1:
            return
        slots = layout.chunks_per_rank
        self._sent = rows.movedim(1, 0).contiguous()
        self._received = ranks.receive_buffer(self._sent, *self._sent.shape)
        rank, world = ranks.rank, ranks.world_size
        after, before = (rank + 1) % world, (rank - 1) % world
        # Slot 0 ascends with the rank and slot 1 descends, so they send opposite ways.
        to = [before, after] if back else [after, before]
        sends = [(self._sent[slot], to[slot]) for slot in range(slots)]
        receives = [(self._received[slot], to[1 - slot]) for slot in range(slots)]
        assert ranks.flat is not None
        self._works = exchange(sends, receives, ranks.flat)

    def wait(self) -> Tensor:
        """Return, for each of this rank's chunks, what arrived: [B, num_chunks, L-1, H, D].

        Forward: the rows of the chunk before. Back: the gradient from the chunk after. Zero where
        there is no such chunk.
        """
        if self._works is None:
            return torch.zeros_like(self._rows)
        name = "boundary_backward" if self._back else "boundary"
        with self._spans.span(name, "wait", 0, self._rows.device):
            self._works.wait()
        layout, rank = self._layout, self._ranks.rank
        for slot, chunk in enumerate(layout.chunks(rank)):
            neighbour = chunk + 1 if self._back else chunk - 1
            if not 0 <= neighbour < layout.num_chunks:
                self._received[slot].zero_()
                continue
            owner, owner_slot = layout.owner(neighbour)
            if owner == rank:
                self._received[slot].copy_(self._sent[owner_slot])
        return self._received.movedim(0, 1)
