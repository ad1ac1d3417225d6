"""Everything about one attention that is known before it runs, and what follows from it alone.

The ring and the cost model read the same record, so that the model plays the schedule that runs:
rounds, groups of heads, bytes of a step and whether parts are held are decided here and nowhere
else. Pure integers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import NamedTuple

from lhcp.comm.layout import Layout


class Mask(NamedTuple):
    """Which keys a query may attend to, in a whole attention or in one block of it."""

    causal: bool
    """The triangle: keys up to the query's own. Else every key."""
    documents: int = 0
    """Documents that one chunk of a batch row holds rows of, at most; 0: rows are not packed. What
    follows is of packed rows: `Limits`."""
    longest: int = 0
    """Rows of one document, at most."""
    reach: int = 0
    """How many chunks before that of its last row a document begins, at most."""


CAUSAL = Mask(True)
FULL = Mask(False)


class Tuning(NamedTuple):
    """From which sizes on an attention is cut up; the results differ in rounding alone."""

    min_round_pairs: int = 2**31
    """Queries x keys x heads of a step of the ring. Smaller ones run badly on a GPU: launches,
    merges and half-empty waves take their share. Larger ones delay the bytes that travel
    meanwhile."""
    round_length: int = 0
    """Distances in a round of the ring; 0: as many as `min_round_pairs` asks for."""
    min_group_bytes: int = 16 * 2**20
    """A group of heads gathers at least this much: below, latency costs more than overlap gains."""
    min_group_rows: int = 4 * 132 * 128
    """Queries of a chunk x their heads in a group: four tiles for each multiprocessor of an H200.
    Two cost 5% more there than all heads at once, a half of one 20%."""
    num_head_groups: int = 0
    """Groups of heads of a gather; 0: as many as the two above allow."""
    held_bytes: int = 2**28
    """Partial results that are kept until all can be summed at once, of outputs or of gradients.
    Where there are more, sums are made on the way: memory then does not grow with the number of
    ranks."""
    min_hidden_bytes: int = 2**24
    """Gradients of the last round of a ring, from which on a part of the own keys is kept back to
    hide them. The part is a call more: 50 us on an H200, in which 10 MB travel."""
    min_hiding_pairs: int = 2**26
    """Queries x keys x heads of that part at least, 170 us of a backward on an H200."""
    head_start_pairs: int = 2**26
    """Queries x keys x heads of the own keys' call, from which on the messages that travel beside
    it begin first: `CallStreams.start`."""
    held_results: int = 32
    """Partial results that one merge reads at most: each is twelve arguments of one kernel, whose
    arguments have 4 KiB."""


DEFAULT_TUNING = Tuning()


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Sizes, ranks, layout and mask of one attention over all ranks."""

    seqlen: int
    """S, tokens or entries of all ranks together."""
    layout: Layout
    num_heads: int
    num_kv_heads: int
    head_dim: int
    batch: int = 1
    element_bytes: int = 2
    """Bytes of an element of q, k, v as they are computed with."""
    wire_bytes: int | None = None
    """Bytes of an element of k, v as they travel; None: as they are computed with. Parts of their
    gradients travel as the kernels write them."""
    mask: Mask = CAUSAL
    node_size: int | None = None
    """Ranks of one node; None where all ranks are on one."""
    tuning: Tuning = DEFAULT_TUNING

    def pack(self) -> list[int]:
        """Return everything but the layout as integers; `unpack` is the way back."""
        sizes = (self.seqlen, self.num_heads, self.num_kv_heads, self.head_dim, self.batch)
        wire, node = self.wire_bytes or 0, self.node_size or 0
        return [*sizes, self.element_bytes, wire, node, *map(int, self.mask), *self.tuning]

    def in_words(self) -> dict[str, str]:
        """Return the fields by name."""
        return {field.name: str(getattr(self, field.name)) for field in fields(self)}

    @staticmethod
    def unpack(layout: Layout, integers: Sequence[int]) -> "AttentionShape":
        """Return the shape that was packed, one object for equal ones: its rounds are cut once."""
        return _unpacked(layout, tuple(integers))

    @property
    def world_size(self) -> int:
        """W, the number of ranks."""
        return self.layout.world_size

    @property
    def num_nodes(self) -> int:
        """Nodes that the ranks are on."""
        return 1 if self.node_size is None else self.world_size // self.node_size

    @property
    def tokens(self) -> int:
        """Tokens or entries of one rank."""
        return self.seqlen // self.world_size

    @property
    def chunk(self) -> int:
        """Tokens or entries of one chunk."""
        return self.seqlen // self.layout.num_chunks

    @property
    def met_rows(self) -> int:
        """Rows of a chunk that others attend to, and that attend to others, in a ring: of queries
        its first, of keys its last; all of them where documents may be longer than a chunk."""
        mask = self.mask
        if not (mask.causal and mask.documents) or mask.reach > 1:
            return self.chunk
        return min(self.chunk, mask.longest)

    @property
    def sum_bytes(self) -> int:
        """Bytes of an element of a sum over calls or ranks."""
        return 8 if self.element_bytes == 8 else 4

    @property
    def q_elements(self) -> int:
        """Elements of one rank's q."""
        return self.batch * self.tokens * self.num_heads * self.head_dim

    @property
    def kv_elements(self) -> int:
        """Elements of one rank's k and v."""
        return 2 * self.batch * self.tokens * self.num_kv_heads * self.head_dim

    @property
    def q_bytes(self) -> int:
        """Bytes of one rank's q, or of its output."""
        return self.q_elements * self.element_bytes

    @property
    def kv_bytes(self) -> int:
        """Bytes of one rank's k and v as they travel."""
        return self.kv_elements * (self.wire_bytes or self.element_bytes)

    @property
    def kv_sum_bytes(self) -> int:
        """Bytes of the wide sums of one rank's dk and dv."""
        return self.kv_elements * self.sum_bytes

    @property
    def grad_bytes(self) -> int:
        """Bytes of dk and dv of one rank's keys, as the kernels write them and as they travel."""
        return self.kv_elements * self.element_bytes

    @property
    def chunk_bytes(self) -> int:
        """Bytes of k and v of one chunk as they travel."""
        return self.kv_bytes // self.layout.chunks_per_rank

    @property
    def part_bytes(self) -> int:
        """Bytes of a part: of dk and dv of one chunk, from one rank."""
        return self.grad_bytes // self.layout.chunks_per_rank

    def of_met_rows(self, num_bytes: int) -> int:
        """Return what is left of so many bytes of whole chunks where `met_rows` of each travel."""
        return num_bytes * self.met_rows // self.chunk

    @cached_property
    def rounds(self) -> tuple[range, ...]:
        """Distances 1 to W - 1 of the ring, cut into rounds; a round's keys make one step.

        Blocks that are large enough take a distance each. Else a round is as many distances as make
        a large block, up to half of all: the first round's keys travel behind the own keys alone,
        and the last round's gradients behind nothing. Rounds are equally long, so that each travels
        while one like it is computed; the last one takes what is left.

            W = 8, blocks of a third of min_round_pairs: distances 1 2 3 | 4 5 6 | 7
        """
        world, length = self.world_size, self.tuning.round_length
        if not length:
            pairs = self.batch * self.tokens * self.chunk * self.num_heads
            wanted = -(-self.tuning.min_round_pairs // max(pairs, 1))
            length = max(1, min(wanted, world // 2))
        return tuple(range(start, min(start + length, world)) for start in range(1, world, length))

    @cached_property
    def head_groups(self) -> tuple[tuple[int, int], ...]:
        """Runs [start, stop) of kv heads that are gathered one after another.

        With few ranks the diagonal is long enough to hide a gather on its own.
        """
        wanted = self.tuning.num_head_groups
        if not wanted:
            query_rows = self.batch * self.chunk * self.num_heads
            wanted = min(
                query_rows // self.tuning.min_group_rows,
                self.world_size * self.kv_bytes // self.tuning.min_group_bytes,
                self.world_size // 2,
            )
        return split_heads(self.num_kv_heads, wanted)

    @property
    def splits_own(self) -> bool:
        """Whether a backward of the ring keeps a part of the own keys for last.

        The last round's gradients would else travel behind nothing. Of two own chunks the part is
        the later one over the earlier one; what the first round's keys travel behind is the two
        triangles, as much work again.
        """
        if not self.mask.causal or self.mask.documents or not self.rounds:
            return False
        if self.layout.chunks_per_rank != 2:
            return False
        tuning, pairs = self.tuning, self.batch * self.chunk**2 * self.num_heads
        returned = len(self.rounds[-1]) * self.grad_bytes
        return pairs >= tuning.min_hiding_pairs and returned >= tuning.min_hidden_bytes

    @property
    def gives_head_start(self) -> bool:
        """Whether a forward's first messages begin before the own keys' call."""
        pairs = self.batch * self.tokens**2 * self.num_heads
        return self.world_size > 1 and pairs >= self.tuning.head_start_pairs

    @property
    def holds_all_parts(self) -> bool:
        """Whether parts of all rounds are summed at once; else each round's once they have come."""
        return (self.world_size - 1) * self.of_met_rows(self.grad_bytes) <= self.tuning.held_bytes

    @property
    def round_bytes(self) -> int:
        """Bytes of the keys and values of a round of the ring, at most."""
        return max(map(len, self.rounds), default=0) * self.kv_bytes

    @property
    def group_bytes(self) -> int:
        """Bytes of the keys and values of all ranks, of one group of heads."""
        return self.world_size * self.kv_bytes // len(self.head_groups)

    @property
    def node_bytes(self) -> int:
        """Bytes of the keys and values of all ranks of a node."""
        return self.world_size // self.num_nodes * self.kv_bytes

    def steps_left(self, step_bytes: int) -> int:
        """Return how many steps' results are left for later while the next step's calls start.

        Args:
            step_bytes: of the keys and values of a step, which are kept with it. Where they are
                large, gaps between calls are short beside these and memory is dear.
        """
        return 2 if step_bytes <= self.tuning.held_bytes else 1


@lru_cache(maxsize=1024)
def _unpacked(layout: Layout, values: tuple[int, ...]) -> AttentionShape:
    seqlen, num_heads, num_kv_heads, head_dim, batch, element, wire, node, *more = values
    fields = len(Mask._fields)
    return AttentionShape(
        seqlen=seqlen,
        layout=layout,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        batch=batch,
        element_bytes=element,
        wire_bytes=wire or None,
        mask=Mask(bool(more[0]), *more[1:fields]),
        node_size=node or None,
        tuning=Tuning(*more[fields:]),
    )


def split_heads(num_kv_heads: int, num_groups: int) -> tuple[tuple[int, int], ...]:
    """Cut kv heads into at most `num_groups` runs of equal length: [start, stop) each."""
    num_groups = max(1, min(num_groups, num_kv_heads))
    while num_kv_heads % num_groups:
        num_groups -= 1
    size = num_kv_heads // num_groups
    return tuple((start, start + size) for start in range(0, num_kv_heads, size))
