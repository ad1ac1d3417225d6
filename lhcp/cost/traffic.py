"""What rotations send and hold: bytes and messages, counted exactly, from a shape alone."""

from collections.abc import Callable
from dataclasses import dataclass

from lhcp.cost.calibration import BlockSize, Direction
from lhcp.ring.parts import gather_segments, parts_sent, ring_sources
from lhcp.ring.schedule import round_chunks
from lhcp.ring.shape import AttentionShape


@dataclass(frozen=True, order=True)
class Traffic:
    """What one rank sends in one direction of one attention."""

    num_bytes: int
    """A gather counts W - 1 times the rank's own part: what a ring of them has to move. An
    all-to-all counts what is for others."""
    num_messages: int
    """Sends as gloo posts them; NCCL gathers and exchanges many of them as one collective."""


def traffic(rotation: str, shape: AttentionShape, direction: Direction, rank: int) -> Traffic:
    """Count what one rank sends, exactly: bytes on any backend, messages as gloo posts them.

    Raises:
        ValueError: the model does not know the rotation.
    """
    if rotation not in TRAFFIC:
        raise ValueError(f"rotation={rotation!r}: the cost model knows {', '.join(TRAFFIC)}")
    if shape.world_size == 1:
        return Traffic(0, 0)
    return TRAFFIC[rotation](shape, direction == "backward", rank)


def _p2p(shape: AttentionShape, back: bool, rank: int) -> Traffic:
    layout, mask, others = shape.layout, shape.mask, range(1, shape.world_size)
    keys = sum(map(len, ring_sources(rank, layout, mask, (others,))))
    parts = len(round_chunks(rank, layout, mask, others)) if back else 0
    num_bytes = keys * shape.chunk_bytes + parts * shape.part_bytes
    return Traffic(num_bytes, 2 * (keys + parts))


def _allgather(shape: AttentionShape, back: bool, rank: int) -> Traffic:
    everyone, others = range(shape.world_size), shape.world_size - 1
    segments = gather_segments(shape.layout, shape.mask, everyone, everyone)
    parts = parts_sent(segments, shape.world_size)[rank] if back else 0
    keys = shape.layout.chunks_per_rank * others
    num_bytes = others * shape.kv_bytes + parts * shape.part_bytes
    return Traffic(num_bytes, 2 * len(shape.head_groups) * (keys + parts))


def _alltoall(shape: AttentionShape, back: bool, rank: int) -> Traffic:
    lse = shape.q_elements // shape.head_dim * shape.sum_bytes
    sent = 2 * shape.q_bytes + (shape.grad_bytes if back else shape.kv_bytes + lse)
    return Traffic(sent * (shape.world_size - 1) // shape.world_size, 2 if back else 3)


def _hierarchical(shape: AttentionShape, back: bool, rank: int) -> Traffic:
    kv, sums = shape.kv_bytes, shape.kv_sum_bytes
    nodes, inner = shape.num_nodes, shape.world_size // shape.num_nodes
    num_bytes = (nodes - 1) * kv + nodes * (inner - 1) * kv
    messages = nodes - 1 + nodes * 2 * shape.layout.chunks_per_rank * (inner - 1)
    if back:
        num_bytes += (nodes - 1) * sums
        messages += 2 * (nodes - 1)
        own, index = divmod(rank, inner)
        for node in range(nodes):
            pair = (range(n * inner, (n + 1) * inner) for n in (own, node))
            segments = gather_segments(shape.layout, shape.mask, *pair)
            parts = parts_sent(segments, inner)[index]
            num_bytes += parts * shape.part_bytes
            messages += 2 * parts
    return Traffic(num_bytes, messages)


TRAFFIC: dict[str, Callable[[AttentionShape, bool, int], Traffic]] = {
    "p2p": _p2p,
    "allgather": _allgather,
    "hierarchical": _hierarchical,
    "alltoall": _alltoall,
}
"""(shape, whether it is the backward, rank) -> what the rank sends, with several ranks."""


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
        "alltoall": 2 * (shape.q_bytes + kv),
    }
    if rotation not in held:
        raise ValueError(f"rotation={rotation!r}: the cost model knows {', '.join(held)}")
    return held[rotation] if world > 1 else 0


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
