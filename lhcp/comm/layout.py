"""Which tokens a rank holds: zigzag or contiguous chunks. Pure integers.

Zigzag cuts the sequence into 2W chunks and gives rank r chunks r and 2W-1-r, in that order, so that
every rank has the same causal work (as in Llama 3, arXiv 2407.21783):

    chunk   0   1   2   3   4   5   6   7        W = 4
    rank    0   1   2   3   3   2   1   0

Contiguous gives rank r chunk r of W. On one rank both are the whole sequence in order.
"""

from dataclasses import dataclass
from typing import Literal

LayoutName = Literal["zigzag", "contiguous"]


@dataclass(frozen=True)
class Layout:
    """How one sequence is cut over `world_size` ranks."""

    name: LayoutName
    world_size: int

    @property
    def chunks_per_rank(self) -> int:
        """Contiguous runs of tokens on each rank."""
        return 2 if self.name == "zigzag" and self.world_size > 1 else 1

    @property
    def num_chunks(self) -> int:
        """Chunks of the whole sequence."""
        return self.chunks_per_rank * self.world_size

    def chunks(self, rank: int) -> tuple[int, ...]:
        """Return the chunks that `rank` holds, in the order of its tokens, which is ascending."""
        if self.name == "zigzag" and self.world_size > 1:
            return (rank, 2 * self.world_size - 1 - rank)
        return (rank,)

    def owner(self, chunk: int) -> tuple[int, int]:
        """Return (rank, slot): which rank holds `chunk`, and as which of its chunks."""
        if self.chunks_per_rank == 1:
            return chunk, 0
        if chunk < self.world_size:
            return chunk, 0
        return self.num_chunks - 1 - chunk, 1

    def check_seqlen(self, seqlen: int) -> None:
        """Check that `seqlen` tokens cut into equal chunks.

        Raises:
            ValueError: they do not.
        """
        if seqlen < 1 or seqlen % self.num_chunks:
            low = seqlen // self.num_chunks * self.num_chunks
            fits = f"{low} or {low + self.num_chunks}" if low > 0 else f"{self.num_chunks}"
            raise ValueError(
                f"seqlen={seqlen}: the {self.name} layout on {self.world_size} ranks needs a "
                f"multiple of {self.num_chunks}, for example {fits}"
            )


LAYOUTS: tuple[LayoutName, ...] = ("zigzag", "contiguous")


def make_layout(name: str, world_size: int) -> Layout:
    """Return the layout called `name` for `world_size` ranks.

    Raises:
        ValueError: no layout has this name.
    """
    for known in LAYOUTS:
        if name == known:
            return Layout(known, world_size)
    raise ValueError(f"layout={name!r}: must be one of {', '.join(LAYOUTS)}")
