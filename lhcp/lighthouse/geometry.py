"""Level arithmetic of one rank's tokens: sizes, offsets and strata. Pure integers, no tensors.

Terms, used everywhere: a *level* is one floor of the pyramid (0 the tokens, L-1 the coarsest); an
*entry* (level, i) covers the *window* of tokens [i p^level, (i+1) p^level); a *stratum* is one of C
equal parts of the whole sequence, which selects on its own; a *chunk* is a contiguous run of tokens
held by a rank (two with zigzag). The local *pyramid* lists all entries of a rank, level 0 first;
an entry's id is its index in that list. The *sub-sequence* is the gathered, ordered selection.
"""

from dataclasses import dataclass

from lhcp.config import LighthouseConfig


@dataclass(frozen=True)
class Geometry:
    """Sizes of the tokens that one rank holds, all of whole strata and whole chunks."""

    num_tokens: int
    """n, tokens on this rank."""
    num_strata: int
    """Strata on this rank."""
    num_chunks: int
    """Contiguous runs of tokens on this rank, of equal length: 2 with zigzag and W > 1, else 1."""
    num_levels: int
    pool_factor: int
    picks: int
    """m, entries that a stratum takes at each level from L-1 to 1."""
    has_first: bool
    """Whether this rank's first stratum is the first of the whole sequence."""

    @classmethod
    def local(
        cls, config: LighthouseConfig, num_tokens: int, world_size: int, num_chunks: int, rank: int
    ) -> "Geometry":
        """Return the geometry of `rank`, which holds `num_tokens` of the whole sequence.

        Raises:
            ValueError: the whole sequence, `num_tokens * world_size`, does not fit the config, or
                the strata do not divide over the chunks of all ranks.
        """
        config.check_seqlen(num_tokens * world_size)
        config.check_chunks(world_size * num_chunks)
        return cls(
            num_tokens=num_tokens,
            num_strata=config.num_strata // world_size,
            num_chunks=num_chunks,
            num_levels=config.num_levels,
            pool_factor=config.pool_factor,
            picks=config.picks,
            has_first=rank == 0,
        )

    def window(self, level: int) -> int:
        """Return the tokens under one entry of `level`."""
        return self.pool_factor**level

    def level_size(self, level: int) -> int:
        """Return the number of entries of `level` on this rank."""
        return self.num_tokens // self.window(level)

    def offset(self, level: int) -> int:
        """Return the id of entry 0 of `level` in the local pyramid, or its size for num_levels."""
        return sum(self.level_size(i) for i in range(level))

    @property
    def pyramid_size(self) -> int:
        """Entries of all levels on this rank, level 0 included."""
        return self.offset(self.num_levels)

    @property
    def pooled_size(self) -> int:
        """Entries of levels 1 to L-1 on this rank."""
        return self.pyramid_size - self.num_tokens

    @property
    def stratum_size(self) -> int:
        """Tokens of one stratum."""
        return self.num_tokens // self.num_strata

    @property
    def chunk_size(self) -> int:
        """Tokens of one chunk."""
        return self.num_tokens // self.num_chunks

    def num_candidates(self, level: int) -> int:
        """Return the number of entries of `level` that are in the sub-sequence of one stratum."""
        if level == self.num_levels - 1:
            return self.stratum_size // self.window(level)
        return self.picks * self.pool_factor

    @property
    def stratum_subsequence(self) -> int:
        """Sub-sequence entries of one stratum, S / C."""
        return sum(self.num_candidates(level) for level in range(self.num_levels))

    @property
    def subsequence(self) -> int:
        """Sub-sequence entries of this rank, S / W."""
        return self.num_strata * self.stratum_subsequence
