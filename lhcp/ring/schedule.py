"""Who attends to what: pure functions from (rank, layout, causal) to steps. Integers only.

Everything follows from one rule. Under a causal mask a chunk of queries c attends to the chunks of
keys before it in full and to chunk c by the triangle. What a rotation delivers at a step is a run
of key chunks; `attend` turns it into as few block calls as the layout allows:

    zigzag, p2p, rank 1 of 4: queries are chunks (1, 6)
    step 0, own keys (1, 6): one square causal call, since both runs ascend
    step 1, of rank 0: both query chunks attend to chunk 0 in full, none to 7, which stays there
    step 2, of ranks 3 and 2: query chunk 6 attends to chunks 5, 4, 3, 2 in full, 1 to none
"""

from dataclasses import dataclass
from functools import cache

from lhcp.comm.layout import Layout


@dataclass(frozen=True)
class Call:
    """One block attention: runs of chunks, as [start, stop) in the rank's and the step's order."""

    q: tuple[int, int]
    kv: tuple[int, int]
    causal: bool
    """The triangle: the runs hold the same chunks (else every query attends to every key)."""
    per_chunk: bool = False
    """Each chunk of the run attends within itself alone: chunks go into the batch axis."""

    @property
    def num_keys(self) -> int:
        """Chunks of keys."""
        return self.kv[1] - self.kv[0]


@dataclass(frozen=True)
class Step:
    """What one delivery of keys and values is used for."""

    calls: tuple[Call, ...]
    heads: tuple[int, int]
    """kv heads [start, stop) that this step covers."""
    first: bool
    """The first step of its heads: it covers every query."""


def attend(q_chunks: tuple[int, ...], kv_chunks: tuple[int, ...], causal: bool) -> tuple[Call, ...]:
    """Return calls that let each query chunk see all that it may, each key chunk in one call.

    Under a causal mask a query chunk's own keys may be in `kv_chunks` only if the two are equal.
    Neighbouring key chunks that the same queries see share a call.
    """
    if not causal or q_chunks == kv_chunks:
        return (Call((0, len(q_chunks)), (0, len(kv_chunks)), causal),)
    calls: list[Call] = []
    for place, chunk in enumerate(kv_chunks):
        # Query chunks ascend: those after this one.
        q = (sum(other < chunk for other in q_chunks), len(q_chunks))
        if q[0] == q[1]:
            continue
        if calls and calls[-1].q == q and calls[-1].kv[1] == place:
            calls[-1] = Call(q, (calls[-1].kv[0], place + 1), False)
        else:
            calls.append(Call(q, (place, place + 1), False))
    return tuple(calls)


def prefixes(q_chunks: tuple[int, ...], kv_chunks: tuple[int, ...]) -> tuple[Call, ...]:
    """Return the calls that let each query chunk see the chunks of keys before it, in full.

    They must be a contiguous run of `kv_chunks`, in any order, since a full block does not care;
    that holds for every delivery of every rotation. Neighbouring query chunks share a call.
    """
    calls: list[Call] = []
    for slot, chunk in enumerate(q_chunks):
        seen = [i for i, other in enumerate(kv_chunks) if other < chunk]
        if not seen:
            continue
        assert seen == list(range(seen[0], seen[-1] + 1)), (q_chunks, kv_chunks)
        run = (seen[0], seen[-1] + 1)
        if calls and calls[-1].kv == run and calls[-1].q[1] == slot:
            calls[-1] = Call((calls[-1].q[0], slot + 1), run, False)
        else:
            calls.append(Call((slot, slot + 1), run, False))
    return tuple(calls)


def diagonal(num_chunks: int) -> Call:
    """Return the call in which each of a rank's own chunks attends within itself."""
    return Call((0, num_chunks), (0, num_chunks), True, per_chunk=num_chunks > 1)


MIN_ROUND_PAIRS = 2**31
"""Queries x keys x heads of a step of the ring. Smaller ones run badly on a GPU: launches, merges
and half-empty waves take their share. Larger ones delay the bytes that travel meanwhile."""


@cache
def ring_rounds(world_size: int, pairs: int) -> tuple[range, ...]:
    """Cut the distances 1 to W - 1 of a ring into rounds; a round's keys make one step.

    Blocks that are large enough take a distance each. Else a round is as many distances as make a
    large block, up to half of all: the first round's keys travel behind the own keys alone, and the
    last round's gradients behind nothing. Rounds are equally long, so that each travels while one
    like it is computed; the last one takes what is left.

    Args:
        pairs: queries x keys x heads that a rank computes for one distance.
    """
    length = max(1, min(-(-MIN_ROUND_PAIRS // max(pairs, 1)), world_size // 2))
    return tuple(
        range(start, min(start + length, world_size)) for start in range(1, world_size, length)
    )


@cache
def round_chunks(rank: int, layout: Layout, causal: bool, distances: range) -> tuple[int, ...]:
    """Chunks that come to `rank` in a round of the ring: those that it may see, the last first.

    In this order the chunks before any chunk are a contiguous run.
    """
    ranks = [(rank - distance) % layout.world_size for distance in distances]
    last = layout.chunks(rank)[-1]
    seen = [c for other in ranks for c in layout.chunks(other) if not causal or c < last]
    return tuple(sorted(seen, reverse=True))


@cache
def p2p_steps(
    rank: int,
    layout: Layout,
    causal: bool,
    num_kv_heads: int,
    rounds: tuple[range, ...],
    backward: bool,
) -> tuple[Step, ...]:
    """Steps of the ring: the own keys, then those of each round.

    In the forward each query is in one call of a round, so that few results are merged; in the
    backward each key, so that few gradients travel. Calls of long tiles come first: a forward's
    tile goes through all keys, a backward's through all queries.
    """
    mine, heads = layout.chunks(rank), (0, num_kv_heads)
    steps = [Step(attend(mine, mine, causal), heads, True)]
    for distances in rounds:
        run = round_chunks(rank, layout, causal, distances)
        calls = prefixes(mine, run) if causal and not backward else attend(mine, run, causal)
        # Later queries see more keys, and earlier keys, which come last, are seen by more queries.
        steps.append(Step(calls[::-1], heads, False))
    return tuple(steps)


def gathered_order(layout: Layout, ranks: range) -> tuple[int, ...]:
    """Chunks in the order in which a gather over `ranks` stores them: the last slot first.

    Each slot of all ranks is one collective, straight into its place. With zigzag this puts chunks
    2W-1, ..., W, 0, ..., W-1: the chunks before any chunk are a contiguous run, with no copy.
    """
    return tuple(
        layout.chunks(rank)[slot]
        for slot in reversed(range(layout.chunks_per_rank))
        for rank in ranks
    )


@cache
def allgather_steps(
    rank: int, layout: Layout, causal: bool, head_groups: tuple[tuple[int, int], ...]
) -> tuple[Step, ...]:
    """Steps of the gather: the local diagonal first, then the prefixes, a group of heads a step."""
    mine = layout.chunks(rank)
    everything = gathered_order(layout, range(layout.world_size))
    if not causal:
        return tuple(Step(attend(mine, everything, False), heads, True) for heads in head_groups)
    first = Step((diagonal(len(mine)),), (head_groups[0][0], head_groups[-1][1]), True)
    before = prefixes(mine, everything)
    return (first, *(Step(before, heads, False) for heads in head_groups))


@cache
def hierarchical_steps(
    rank: int, layout: Layout, causal: bool, num_kv_heads: int, node_size: int
) -> tuple[Step, ...]:
    """Steps of a ring of gathers: the local diagonal, this node's prefixes, then node by node.

    Ranks count node by node: rank = node * node_size + place. At step j the keys are those of node
    - j (mod the nodes), in the order of `gathered_order` among themselves.
    """
    mine, heads = layout.chunks(rank), (0, num_kv_heads)
    num_nodes = layout.world_size // node_size
    own = rank // node_size
    steps: list[Step] = []
    if causal:
        steps.append(Step((diagonal(len(mine)),), heads, True))
    for j in range(num_nodes):
        node = (own - j) % num_nodes
        keys = gathered_order(layout, range(node * node_size, (node + 1) * node_size))
        calls = prefixes(mine, keys) if causal else attend(mine, keys, False)
        steps.append(Step(calls[::-1], heads, not causal and j == 0))
    return tuple(steps)
