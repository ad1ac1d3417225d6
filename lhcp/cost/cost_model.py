"""What a rotation should cost: bytes, FLOPs, and its schedule played through on paper.

Pure functions of static sizes and a `Calibration`. `traffic` counts what the rotations send, byte
for byte; `predict` plays a rotation three times (as it is, without messages, without compute), as
`lhcp.measure_overhead` measures it; `choose` takes the fastest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lhcp.cost.calibration import Calibration, Direction
from lhcp.cost.clocks import Clocks, Sizes, single_seconds
from lhcp.cost.schedules import SCHEDULES, parts_sent
from lhcp.ring.parts import gather_segments, ring_givers
from lhcp.ring.rotation.p2p import holds_all_parts
from lhcp.ring.schedule import ring_rounds, round_chunks
from lhcp.ring.streams import steps_left


@dataclass(frozen=True, order=True)
class Traffic:
    """What one rank sends in one direction of one attention."""

    num_bytes: int
    """A gather counts W - 1 times the rank's own part: what a ring of them has to move. An
    all-to-all counts what is for others."""
    num_messages: int
    """Sends as gloo posts them; NCCL gathers and exchanges many of them as one collective."""


def traffic(rotation: str, sizes: Sizes, direction: Direction, rank: int) -> Traffic:
    """Count what one rank sends, exactly: bytes on any backend, messages as gloo posts them.

    Raises:
        ValueError: the model does not know the rotation.
    """
    world, slots, cut = sizes.world_size, sizes.cut.chunks_per_rank, sizes.cut
    kv = sizes.kv_elements * sizes.element_bytes
    back = direction == "backward"
    if rotation not in SCHEDULES:
        raise ValueError(f"rotation={rotation!r}: the cost model knows {', '.join(SCHEDULES)}")
    if world == 1:
        return Traffic(0, 0)
    if rotation == "p2p":
        others = range(1, world)
        keys = sum(len(ring_givers(rank, cut, sizes.causal, (others,))[i]) for i in range(slots))
        parts = len(round_chunks(rank, cut, sizes.causal, others)) if back else 0
        return Traffic((keys + parts) * sizes.chunk_bytes, 2 * (keys + parts))
    if rotation == "allgather":
        everyone = range(world)
        plan = gather_segments(cut, sizes.causal, everyone, everyone)
        parts = parts_sent(plan, world)[rank] if back else 0
        messages = 2 * len(sizes.head_groups) * (slots * (world - 1) + parts)
        return Traffic((world - 1) * kv + parts * sizes.chunk_bytes, messages)
    if rotation == "hierarchical":
        return _hierarchical_traffic(sizes, back, rank)
    wide = 8 if sizes.element_bytes == 8 else 4
    q, lse = sizes.q_elements * sizes.element_bytes, sizes.q_elements // sizes.head_dim * wide
    sent = 2 * q + kv + (0 if back else lse)
    return Traffic(sent * (world - 1) // world, 2 if back else 3)


def _hierarchical_traffic(sizes: Sizes, back: bool, rank: int) -> Traffic:
    kv, sums = sizes.kv_elements * sizes.element_bytes, sizes.kv_elements * sizes.grad_bytes
    nodes, inner = sizes.num_nodes, sizes.world_size // sizes.num_nodes
    num_bytes = (nodes - 1) * kv + nodes * (inner - 1) * kv
    messages = nodes - 1 + nodes * 2 * sizes.cut.chunks_per_rank * (inner - 1)
    if back:
        num_bytes += (nodes - 1) * sums
        messages += 2 * (nodes - 1)
        own, place = divmod(rank, inner)
        for node in range(nodes):
            pair = (range(n * inner, (n + 1) * inner) for n in (own, node))
            plan = gather_segments(sizes.cut, sizes.causal, *pair)
            parts = parts_sent(plan, inner)[place]
            num_bytes += parts * sizes.chunk_bytes
            messages += 2 * parts
    return Traffic(num_bytes, messages)


def most_traffic(rotation: str, sizes: Sizes, direction: Direction) -> Traffic:
    """Return the traffic of the rank that sends most."""
    return max(traffic(rotation, sizes, direction, rank) for rank in range(sizes.world_size))


def rotation_memory(rotation: str, sizes: Sizes) -> int:
    """Bytes that one rank holds at most in the backward, beside its own inputs and results.

    Raises:
        ValueError: the model does not know the rotation.
    """
    kv, sums = sizes.kv_elements * sizes.element_bytes, sizes.kv_elements * sizes.grad_bytes
    world, num_groups, nodes = sizes.world_size, len(sizes.head_groups), sizes.num_nodes
    inner = world // nodes
    lengths = [len(distances) for distances in ring_rounds(world, sizes.ring_pairs)]
    others = sum(lengths) if holds_all_parts(world, kv) else max(lengths, default=0)

    def steps(step_bytes: int) -> int:
        """Of how many steps there are keys, under way or in use; and parts, being made or sent."""
        return steps_left(step_bytes) + 2

    in_rounds = 2 * sum(lengths[: steps(max(lengths, default=0) * kv)]) * kv
    in_groups = 2 * min(steps(world * kv // num_groups), num_groups)
    in_nodes = 2 * min(steps(inner * kv), nodes)
    held = {
        # And what others sent, and the sums.
        "p2p": in_rounds + others * kv + 2 * sums,
        # And what others sent of a group of heads, and the diagonal's own.
        "allgather": world * kv * (in_groups + 1) // num_groups + kv,
        "hierarchical": 3 * kv + (in_nodes + 1) * inner * kv + 3 * sums,
        "alltoall": 2 * (sizes.q_elements * sizes.element_bytes + kv),
    }
    if rotation not in held:
        raise ValueError(f"rotation={rotation!r}: the cost model knows {', '.join(held)}")
    return held[rotation] if world > 1 else 0


def boundary_bytes(sizes: Sizes, num_levels: int) -> int:
    """Bytes that one rank sends a direction for the rows that chunks owe each other."""
    if sizes.world_size == 1:
        return 0
    row = sizes.num_heads * sizes.head_dim * sizes.element_bytes
    return sizes.cut.chunks_per_rank * sizes.batch * (num_levels - 1) * row


def attention_flops(
    queries: int, keys: int, num_heads: int, head_dim: int, causal: bool, direction: Direction
) -> float:
    """FLOPs of one block: two products of 2 D per pair forward, five backward (arXiv 2205.14135).

    Args:
        causal: the triangle, of the last `queries` rows of a square of `keys` if they differ.
        num_heads: query heads, times the batch.
    """
    pairs = queries * keys - (queries * queries / 2 if causal else 0)
    return (4 if direction == "forward" else 10) * pairs * num_heads * head_dim


@dataclass(frozen=True)
class PhasePrediction:
    """One direction, in seconds."""

    real: float
    """T, the slowest rank."""
    compute: float
    """C: with messages that take no time."""
    communication: float
    """M: with compute that takes no time."""
    step_compute: tuple[float, ...]
    """The slowest rank's compute at each step."""
    traffic: Traffic

    @property
    def exposed(self) -> float:
        """T - C."""
        return self.real - self.compute


@dataclass(frozen=True)
class Prediction:
    """What a rotation should cost."""

    rotation: str
    sizes: Sizes
    forward: PhasePrediction
    backward: PhasePrediction
    single: float
    """T1: one device, forward and backward."""

    @property
    def real(self) -> float:
        """T, forward and backward."""
        return self.forward.real + self.backward.real

    @property
    def overhead(self) -> float:
        """W T / T1 - 1."""
        return self.sizes.world_size * self.real / self.single - 1


def predict(rotation: str, sizes: Sizes, calibration: Calibration) -> Prediction:
    """Play a rotation through.

    Raises:
        ValueError: the model does not know the rotation, or the sizes do not fit it.
    """
    sizes.cut.check_seqlen(sizes.seqlen)

    def phase(direction: Direction) -> PhasePrediction:
        def play(compute: bool, communicate: bool) -> Clocks:
            clocks = Clocks(sizes, calibration, direction, compute, communicate)
            if sizes.world_size == 1:
                clocks.work([single_seconds(sizes, calibration, direction)])
            else:
                SCHEDULES[rotation](clocks)
            return clocks

        sent = most_traffic(rotation, sizes, direction)
        alone = play(True, False)
        return PhasePrediction(
            play(True, True).seconds,
            alone.seconds,
            play(False, True).seconds if sizes.world_size > 1 else 0.0,
            tuple(alone.steps),
            sent,
        )

    single = sum(single_seconds(sizes, calibration, d) for d in ("forward", "backward"))
    return Prediction(rotation, sizes, phase("forward"), phase("backward"), single)


def choose(
    sizes: Sizes,
    calibration: Calibration,
    rotations: Sequence[str] = ("allgather", "p2p", "hierarchical"),
) -> tuple[str, str]:
    """Choose the rotation with the shortest predicted forward + backward.

    A pure function: ranks with equal arguments never differ. "hierarchical" is considered where
    there are several nodes; at equal times the first name wins.

    Returns:
        (rotation, reason), the reason with all candidates' times.
    """
    able = [r for r in rotations if r != "hierarchical" or sizes.num_nodes > 1]
    seconds = {r: predict(r, sizes, calibration).real for r in able}
    best = min(able, key=lambda r: seconds[r])
    times = ", ".join(f"{r} {1e3 * t:.2f}" for r, t in seconds.items())
    return best, f"predicted ms forward + backward on {calibration.name}: {times}"
