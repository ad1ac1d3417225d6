"""What rotations send and hold: bytes and messages, counted exactly, from a shape alone."""

from dataclasses import dataclass

from lhcp.cost.calibration import BlockSize, Direction
from lhcp.cost.schedules import SCHEDULES
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
    world, layout, mask = shape.world_size, shape.layout, shape.mask
    slots, kv = layout.chunks_per_rank, shape.kv_bytes
    back = direction == "backward"
    if rotation not in SCHEDULES:
        raise ValueError(f"rotation={rotation!r}: the cost model knows {', '.join(SCHEDULES)}")
    if world == 1:
        return Traffic(0, 0)
    if rotation == "p2p":
        others = range(1, world)
        keys = sum(map(len, ring_sources(rank, layout, mask, (others,))))
        parts = len(round_chunks(rank, layout, mask, others)) if back else 0
        return Traffic((keys + parts) * shape.chunk_bytes, 2 * (keys + parts))
    if rotation == "allgather":
        everyone = range(world)
        plan = gather_segments(layout, mask, everyone, everyone)
        parts = parts_sent(plan, world)[rank] if back else 0
        messages = 2 * len(shape.head_groups) * (slots * (world - 1) + parts)
        return Traffic((world - 1) * kv + parts * shape.chunk_bytes, messages)
    if rotation == "hierarchical":
        return _hierarchical_traffic(shape, back, rank)
    q, lse = shape.q_bytes, shape.q_elements // shape.head_dim * shape.sum_bytes
    sent = 2 * q + kv + (0 if back else lse)
    return Traffic(sent * (world - 1) // world, 2 if back else 3)


def _hierarchical_traffic(shape: AttentionShape, back: bool, rank: int) -> Traffic:
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
            plan = gather_segments(shape.layout, shape.mask, *pair)
            parts = parts_sent(plan, inner)[index]
            num_bytes += parts * shape.chunk_bytes
            messages += 2 * parts
    return Traffic(num_bytes, messages)


def most_traffic(rotation: str, shape: AttentionShape, direction: Direction) -> Traffic:
    """Return the traffic of the rank that sends most."""
    return max(traffic(rotation, shape, direction, rank) for rank in range(shape.world_size))


def rotation_memory(rotation: str, shape: AttentionShape) -> int:
    """Return the bytes that one rank holds at most in the backward, beside inputs and results.

    Raises:
        ValueError: the model does not know the rotation.
    """
    kv, sums = shape.kv_bytes, shape.kv_sum_bytes
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
        "p2p": in_rounds + others * kv + 2 * sums,
        # And what others sent of a group of heads, and the diagonal's own.
        "allgather": world * kv * (in_groups + 1) // num_groups + kv,
        "hierarchical": 3 * kv + (in_nodes + 1) * inner * kv + 3 * sums,
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
