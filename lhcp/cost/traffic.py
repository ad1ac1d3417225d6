"""What rotations send and hold: bytes and messages, counted exactly, from a shape alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lhcp.cost.calibration import BlockSize, Direction
from lhcp.ring.heads import (
    RING,
    SHARE_HEADS,
    exchange_ranks,
    partners,
    ring_ranks,
    shape_left,
    sharing_ranks,
)
from lhcp.ring.parts import Segment, gather_segments, ring_route
from lhcp.ring.shape import AttentionShape


@dataclass(frozen=True, order=True)
class Traffic:
    """What one rank sends in one direction of one attention."""

    num_bytes: int
    """A gather counts W - 1 times the rank's own part: what a ring of them has to move. An
    all-to-all counts what is for others."""
    num_messages: int
    """Sends as gloo posts them, and all-to-alls; NCCL gathers and exchanges many of them as one
    collective."""
    across_bytes: int = 0
    """Of the bytes, those for ranks on other nodes: what goes over NICs. The rest is inside."""
    across_messages: int = 0
    """Of the messages, those that ranks on other nodes get, or some of it."""


class _Sent:
    """Counts what one rank sends, by whether the receiver is on its node.

    Args:
        ranks: the members of a group, counted among all ranks, as receivers are counted.
    """

    def __init__(self, rank: int, node_size: int, ranks: Sequence[int]) -> None:
        self._rank, self._node_size, self._ranks = rank, node_size, ranks
        # Inside the node, and across.
        self.num_bytes, self.messages = [0, 0], [0, 0]

    def on(self, ranks: Sequence[int]) -> "_Sent":
        """Return a counter of a group of these members, which adds to this one."""
        one = _Sent(self._rank, self._node_size, ranks)
        one.num_bytes, one.messages = self.num_bytes, self.messages
        return one

    def add(self, receiver: int, num_bytes: int, messages: int) -> None:
        """Count so many messages, of so many bytes together, if they leave the rank."""
        to = self._ranks[receiver]
        if to != self._rank:
            across = to // self._node_size != self._rank // self._node_size
            self.num_bytes[across] += num_bytes
            self.messages[across] += messages

    def all_to_all(self, receivers: Sequence[int], part_bytes: int) -> None:
        """Count one message to all receivers, with a part for each."""
        nodes = {self._ranks[r] // self._node_size for r in receivers}
        self.messages[nodes != {self._rank // self._node_size}] += 1
        for receiver in receivers:
            self.add(receiver, part_bytes, 0)


Count = Callable[[_Sent, AttentionShape, bool, int], None]


def traffic(rotation: str, shape: AttentionShape, direction: Direction, rank: int) -> Traffic:
    """Count what one rank sends, exactly: bytes on any backend, messages as gloo posts them.

    Raises:
        ValueError: the model does not know the rotation.
    """
    if rotation not in TRAFFIC:
        raise ValueError(f"rotation={rotation!r}: the cost model knows {', '.join(TRAFFIC)}")
    world = shape.world_size
    sent = _Sent(rank, world // shape.num_nodes, range(world))
    if world > 1:
        TRAFFIC[rotation](sent, shape, direction == "backward", rank)
    (inside, across), messages = sent.num_bytes, sent.messages
    return Traffic(inside + across, sum(messages), across, messages[1])


def _p2p(sent: _Sent, shape: AttentionShape, back: bool, rank: int) -> None:
    owners, leaving = ring_route(rank, shape.layout, shape.mask, range(1, shape.world_size))
    for _, receiver in leaving:
        sent.add(receiver, shape.of_met_rows(shape.chunk_bytes), 2)
    for owner in owners if back else ():
        sent.add(owner, shape.of_met_rows(shape.part_bytes), 2)


def _gather(sent: _Sent, shape: AttentionShape, size: int, groups: int = 1) -> None:
    """Count a gather of `size` ranks, by groups of heads."""
    for receiver in range(size):
        sent.add(receiver, shape.kv_bytes, 2 * shape.layout.chunks_per_rank * groups)


def _parts(
    sent: _Sent, shape: AttentionShape, segments: Sequence[Segment], index: int, groups: int = 1
) -> None:
    """Count the parts that rank `index` of a gather gives back."""
    for segment in segments:
        for owner in range(*segment.runs[index]):
            sent.add(owner, shape.part_bytes, 2 * groups)


def _allgather(sent: _Sent, shape: AttentionShape, back: bool, rank: int) -> None:
    everyone, groups = range(shape.world_size), len(shape.head_groups)
    _gather(sent, shape, len(everyone), groups)
    if back:
        segments = gather_segments(shape.layout, shape.mask, everyone, everyone)
        _parts(sent, shape, segments, rank, groups)


def _hierarchical(sent: _Sent, shape: AttentionShape, back: bool, rank: int) -> None:
    nodes, size = shape.num_nodes, shape.world_size // shape.num_nodes
    own, index = divmod(rank, size)
    of_node = [range(node * size, (node + 1) * size) for node in range(nodes)]
    inside, outside = sent.on(of_node[own]), sent.on(range(index, shape.world_size, size))
    for node in range(nodes):
        _gather(inside, shape, size)
        if node != own:
            outside.add((own + 1) % nodes, shape.kv_bytes, 1)
        if back:
            outside.add(node, shape.kv_sum_bytes, 2)
            pair = (of_node[own], of_node[node])
            _parts(inside, shape, gather_segments(shape.layout, shape.mask, *pair), index)


def _shares_heads(rotation: str) -> Count:
    """Return the count of a rotation of `SHARE_HEADS`: exchanges, and the ring that is left."""

    def count(sent: _Sent, shape: AttentionShape, back: bool, rank: int) -> None:
        where = (rank, shape.world_size, shape.node_size)
        sharing, left = sharing_ranks(rotation, *where[1:]), shape_left(rotation, shape)
        if sharing > 1:
            to, sources = partners(rotation, *where)
            peers = sent.on(exchange_ranks(rotation, *where))
            # A rank's q, k and v of the heads as they are left: of kv heads all that travel.
            out, kv = left.q_bytes // sharing, left.kv_bytes // sharing
            for ends, part in (
                ((to, out), (sources, out + left.grad_bytes // sharing))
                if back
                else ((to, out + kv), (sources, out))
            ):
                peers.all_to_all(ends, part)
        ring = ring_ranks(rotation, *where)
        if len(ring) > 1:
            _p2p(sent.on(ring), left, back, ring.index(rank))

    return count


TRAFFIC: dict[str, Count] = {
    "p2p": _p2p,
    "allgather": _allgather,
    "hierarchical": _hierarchical,
    **{name: _shares_heads(name) for name in SHARE_HEADS},
}
"""(counter, shape, whether it is the backward, rank): counts what the rank sends, of several."""


def most_traffic(rotation: str, shape: AttentionShape, direction: Direction) -> Traffic:
    """Return the traffic of the rank that sends most."""
    return max(traffic(rotation, shape, direction, rank) for rank in range(shape.world_size))


def rotation_memory(rotation: str, shape: AttentionShape) -> int:
    """Return the bytes that one rank holds at most in the backward, beside inputs and results.

    Raises:
        ValueError: the model does not know the rotation.
    """
    kv, grads, sums = shape.kv_bytes, shape.grad_bytes, shape.kv_sum_bytes
    world, num_groups, nodes = shape.world_size, len(shape.head_groups), shape.num_nodes
    inner = world // nodes
    lengths = [len(distances) for distances in shape.rounds]
    others = sum(lengths) if shape.holds_all_parts else max(lengths, default=0)

    def steps(step_bytes: int) -> int:
        """Count the steps with keys under way or in use, and parts being made or sent."""
        return shape.steps_left(step_bytes) + 2

    in_rounds = 2 * sum(lengths[: steps(shape.round_bytes)]) * kv
    in_groups = 2 * min(steps(shape.group_bytes), num_groups)
    in_nodes = 2 * min(steps(shape.node_bytes), nodes)
    held = {
        # And what others sent, and the sums.
        "p2p": in_rounds + others * shape.grad_bytes + 2 * sums,
        # And what others sent of a group of heads, and the diagonal's own.
        "allgather": world * (kv * in_groups + grads) // num_groups + grads,
        "hierarchical": 3 * kv + inner * (in_nodes * kv + grads) + 3 * sums,
    }
    if world == 1:
        return 0
    if rotation in SHARE_HEADS:
        # What is sent and what has come, q, k and v with it; and the ring of what is left.
        left = shape_left(rotation, shape)
        return 2 * (left.q_bytes + left.kv_bytes) + rotation_memory(RING, left)
    if rotation not in held:
        raise ValueError(f"rotation={rotation!r}: the cost model knows {', '.join(TRAFFIC)}")
    return held[rotation]


def boundary_bytes(shape: AttentionShape, num_levels: int) -> int:
    """Return the bytes that one rank sends a direction for the rows that chunks owe each other."""
    if shape.world_size == 1:
        return 0
    row = shape.num_heads * shape.head_dim * shape.element_bytes
    return shape.layout.chunks_per_rank * shape.batch * (num_levels - 1) * row


def attention_flops(size: BlockSize, direction: Direction) -> float:
    """Count the FLOPs of one block: two products of 2 D per pair forward, five backward.

    Source: arXiv 2205.14135. Causal is the triangle, of the last queries of a square of keys if
    there are fewer.
    """
    pairs = size.queries * size.keys - (size.queries**2 / 2 if size.mask.causal else 0)
    return (4 if direction == "forward" else 10) * pairs * size.num_heads * size.head_dim
