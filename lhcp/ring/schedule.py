"""Who attends to what: pure functions from a shape and a rank to steps. Integers only.

Everything follows from one rule. Under a causal mask a chunk of queries c attends to the chunks of
keys before it in full and to chunk c by the triangle. What a rotation delivers at a step is a run
of key chunks; `calls_by_keys` and `calls_by_queries` turn it into as few block calls as the layout
allows:

    zigzag, p2p, rank 1 of 4: queries are chunks (1, 6)
    step 0, own keys (1, 6): one square causal call, since both runs ascend
    step 1, of rank 0: both query chunks attend to chunk 0 in full, none to 7, which stays there
    step 2, of ranks 3 and 2: query chunk 6 attends to chunks 5, 4, 3, 2 in full, 1 to none

    a long backward, where the last gradients should not travel behind nothing:
    step 0 is the triangles of chunks 1 and 6 alone; a last step is chunk 6 over chunk 1
"""

from functools import lru_cache
from typing import NamedTuple

from lhcp.comm.layout import Layout
from lhcp.ring.shape import CAUSAL, FULL, AttentionShape, Mask


class Call(NamedTuple):
    """One block attention: runs of chunks, as [start, stop) in the rank's and the step's order."""

    q: tuple[int, int]
    kv: tuple[int, int]
    mask: Mask
    """Causal only where the runs hold the same chunks."""
    per_chunk: bool = False
    """Each chunk of the run attends within itself alone: chunks go into the batch axis."""

    @property
    def num_keys(self) -> int:
        """Count the chunks of keys."""
        return self.kv[1] - self.kv[0]


class Step(NamedTuple):
    """What one delivery of keys and values is used for."""

    calls: tuple[Call, ...]
    heads: tuple[int, int]
    """kv heads [start, stop) that this step covers."""
    first: bool
    """The first step of its heads: it covers every query."""
    keys: tuple[int, ...] = ()
    """The chunks of the sequence that are delivered, in order."""
    last: bool = False
    """It begins once all other steps' gradients are under way, and hides the last of them."""
    rows: int = 0
    """Of each chunk, so many: the first of its queries, the last of its keys; 0: all of them."""

    def of_chunk(self, size: int) -> int:
        """Return the rows of a chunk of `size` that take part."""
        return self.rows or size


def calls_by_keys(
    q_chunks: tuple[int, ...], kv_chunks: tuple[int, ...], mask: Mask
) -> tuple[Call, ...]:
    """Return calls that let each query chunk see all that it may, each key chunk in one call.

    Under a causal mask a query chunk's own keys may be in `kv_chunks` only if the two are equal.
    Neighbouring key chunks that the same queries see share a call.
    """
    if not mask.causal or q_chunks == kv_chunks:
        whole = CAUSAL if mask.causal else FULL
        return (Call((0, len(q_chunks)), (0, len(kv_chunks)), whole),)
    calls: list[Call] = []
    for i, chunk in enumerate(kv_chunks):
        # Query chunks ascend: those after this one, as far as a document reaches.
        reached = sum(_reaches(other, chunk, mask) for other in q_chunks)
        before = sum(other < chunk for other in q_chunks)
        q = (before, before + reached)
        if q[0] == q[1]:
            continue
        if calls and calls[-1].q == q and calls[-1].kv[1] == i:
            calls[-1] = Call(q, (calls[-1].kv[0], i + 1), FULL)
        else:
            calls.append(Call(q, (i, i + 1), FULL))
    return tuple(calls)


def _reaches(chunk: int, key_chunk: int, mask: Mask) -> bool:
    """Return whether a chunk of queries may see an earlier chunk of keys, in full or in part."""
    return key_chunk < chunk and (not mask.documents or chunk - key_chunk <= mask.reach)


def calls_by_queries(
    q_chunks: tuple[int, ...], kv_chunks: tuple[int, ...], mask: Mask = CAUSAL
) -> tuple[Call, ...]:
    """Return calls that let each query chunk see the chunks of keys before it, in one call.

    They must be a contiguous run of `kv_chunks`, in any order, since a full block does not care;
    that holds for every delivery of every rotation. Neighbouring query chunks share a call.

    Args:
        mask: of documents that reach so far back; without, every chunk before is seen.
    """
    calls: list[Call] = []
    for slot, chunk in enumerate(q_chunks):
        seen = [_reaches(chunk, other, mask) for other in kv_chunks]
        count = sum(seen)
        if not count:
            continue
        start = seen.index(True)
        run = (start, start + count)
        assert all(seen[start : start + count]), (q_chunks, kv_chunks)
        if calls and calls[-1].kv == run and calls[-1].q[1] == slot:
            calls[-1] = Call((calls[-1].q[0], slot + 1), run, FULL)
        else:
            calls.append(Call((slot, slot + 1), run, FULL))
    return tuple(calls)


def diagonal(num_chunks: int) -> Call:
    """Return the call in which each of a rank's own chunks attends within itself."""
    return Call((0, num_chunks), (0, num_chunks), CAUSAL, per_chunk=num_chunks > 1)


BELOW_DIAGONAL = Call((1, 2), (0, 1), FULL)
"""What `diagonal` leaves of a rank's own two chunks."""


def own_call(shape: AttentionShape, rank: int) -> tuple[Call, Step]:
    """Return the one call in which a rank attends to its own keys, and its step."""
    mine = shape.layout.chunks(rank)
    calls = calls_by_keys(mine, mine, shape.mask)
    return calls[0], Step(calls, (0, shape.num_kv_heads), True, mine)


@lru_cache(maxsize=2**17)
def round_chunks(rank: int, layout: Layout, mask: Mask, distances: range) -> tuple[int, ...]:
    """Return the chunks that come to `rank` in a round of the ring: those that it may see.

    The last one first: in this order the chunks before any chunk are a contiguous run.

        zigzag, rank 1 of 4, chunks (1, 6); distances 2 and 3 are ranks 3 and 2, chunks 3 4, 2 5
        causal: 5 4 3 2, all before chunk 6;  distance 1 is rank 0, chunks 0 7: 0 alone
    """
    mine = layout.chunks(rank)
    ranks = [(rank - distance) % layout.world_size for distance in distances]
    seen = [c for other in ranks for c in layout.chunks(other) if _is_seen(c, mine, mask)]
    return tuple(sorted(seen, reverse=True))


def chunks_at(layout: Layout, mask: Mask, distance: int) -> list[int]:
    """Return how many chunks each rank attends to at a distance: `round_chunks`, counted."""
    of_rank = [layout.chunks(rank) for rank in range(layout.world_size)]
    # Negative indices go round the ring.
    pairs = ((mine, of_rank[rank - distance]) for rank, mine in enumerate(of_rank))
    return [sum(_is_seen(c, mine, mask) for c in others) for mine, others in pairs]


def _is_seen(key_chunk: int, mine: tuple[int, ...], mask: Mask) -> bool:
    """Return whether some chunk of a rank's own may see a chunk of another's keys."""
    return not mask.causal or any(_reaches(chunk, key_chunk, mask) for chunk in mine)


@lru_cache(maxsize=8192)
def p2p_steps(shape: AttentionShape, rank: int, backward: bool) -> tuple[Step, ...]:
    """Return the steps of the ring: the own keys, then those of each round.

    In the forward each query is in one call of a round, so that few results are merged; in the
    backward each key, so that few gradients travel. Calls of long tiles come first: a forward's
    tile goes through all keys, a backward's through all queries. Where `shape.splits_own` a
    backward leaves a part of the own keys for last. Where no document is longer than a chunk, a
    chunk of queries meets the one before it alone, and with `shape.met_rows` of both.
    """
    layout, mask, heads = shape.layout, shape.mask, (0, shape.num_kv_heads)
    mine, by_queries = layout.chunks(rank), mask.causal and not backward
    splits = backward and shape.splits_own
    steps = [own_call(shape, rank)[1]]
    if splits:
        steps = [Step((diagonal(len(mine)),), heads, True, mine)]
    for distances in shape.rounds:
        run = round_chunks(rank, layout, mask, distances)
        calls = calls_by_queries(mine, run, mask) if by_queries else calls_by_keys(mine, run, mask)
        # Later queries see more keys, and earlier keys, which come last, are seen by more queries.
        steps.append(Step(calls[::-1], heads, False, run, rows=shape.met_rows))
    if splits:
        steps.append(Step((BELOW_DIAGONAL,), heads, False, mine, last=True))
    return tuple(steps)


@lru_cache(maxsize=8192)
def gathered_order(layout: Layout, ranks: range) -> tuple[int, ...]:
    """Return chunks in the order in which a gather over `ranks` stores them: the last slot first.

    Each slot of all ranks is one collective, straight into its place. With zigzag this puts chunks
    2W-1, ..., W, 0, ..., W-1: the chunks before any chunk are a contiguous run, with no copy.
    """
    return tuple(
        layout.chunks(rank)[slot]
        for slot in reversed(range(layout.chunks_per_rank))
        for rank in ranks
    )


@lru_cache(maxsize=8192)
def allgather_steps(shape: AttentionShape, rank: int) -> tuple[Step, ...]:
    """Return the steps of the gather: the local diagonal, then the prefixes by groups of heads."""
    mine, groups = shape.layout.chunks(rank), shape.head_groups
    everything = gathered_order(shape.layout, range(shape.world_size))
    if not shape.mask.causal:
        all_keys = calls_by_keys(mine, everything, FULL)
        return tuple(Step(all_keys, heads, True, everything) for heads in groups)
    first = Step((diagonal(len(mine)),), (groups[0][0], groups[-1][1]), True, mine)
    before = calls_by_queries(mine, everything)
    return (first, *(Step(before, heads, False, everything) for heads in groups))


@lru_cache(maxsize=8192)
def hierarchical_steps(shape: AttentionShape, rank: int) -> tuple[Step, ...]:
    """Return the steps of a ring of gathers: the local diagonal, then the prefixes node by node.

    Ranks count node by node: rank = node * node size + index in the node. At step j the keys are
    those of node - j (mod the nodes), in the order of `gathered_order` among themselves.
    """
    mine, heads = shape.layout.chunks(rank), (0, shape.num_kv_heads)
    num_nodes = shape.num_nodes
    node_size = shape.world_size // num_nodes
    own = rank // node_size
    steps: list[Step] = []
    if shape.mask.causal:
        steps.append(Step((diagonal(len(mine)),), heads, True, mine))
    for j in range(num_nodes):
        node = (own - j) % num_nodes
        keys = gathered_order(shape.layout, range(node * node_size, (node + 1) * node_size))
        if shape.mask.causal:
            calls = calls_by_queries(mine, keys)
        else:
            calls = calls_by_keys(mine, keys, FULL)
        steps.append(Step(calls[::-1], heads, not shape.mask.causal and j == 0, keys))
    return tuple(steps)
