"""Each rotation's schedule, played on clocks.

The functions mirror lhcp/ring/rotation file by file: what is posted when, what waits for what. They
decide nothing; `lhcp.cost.choose` asks them for times.
"""

from collections.abc import Callable
from functools import lru_cache

from lhcp.cost.clocks import Clocks, single_seconds
from lhcp.ring.heads import SHARE_HEADS, partners, ring_ranks, shape_left, sharing_ranks
from lhcp.ring.parts import gather_segments, parts_received, parts_sent
from lhcp.ring.schedule import allgather_steps, chunks_at, hierarchical_steps, p2p_steps
from lhcp.ring.shape import AttentionShape


def _p2p(clocks: Clocks) -> None:
    shape = clocks.shape
    world, rounds, held = shape.world_size, shape.rounds, shape.holds_all_parts
    steps = [p2p_steps(shape, rank, clocks.backward) for rank in range(world)]
    grads, sums = map(shape.of_met_rows, (shape.grad_bytes, shape.kv_sum_bytes))
    chunk, part = (float(shape.of_met_rows(b)) for b in (shape.chunk_bytes, shape.part_bytes))
    seen = _chunks_seen(shape)

    def fetch(i: int) -> list[float]:
        """Fetch the keys of a round."""
        return clocks.exchange([(d, [count * chunk for count in seen[d]]) for d in rounds[i]])

    def send_back(i: int) -> list[float]:
        """Return a round's gradients to the owners of the keys."""
        # They come from the rank d after the owner: of what that one has seen.
        return clocks.exchange(
            [(-d, [count * part for count in seen[d][d:] + seen[d][:d]]) for d in rounds[i]]
        )

    coming = fetch(0)
    leaving: list[float] | None = None
    clocks.step([of_rank[0] for of_rank in steps])
    for i in range(len(rounds)):
        clocks.wait(coming)
        if i + 1 < len(rounds):
            coming = fetch(i + 1)
        clocks.step([of_rank[i + 1] for of_rank in steps])
        if clocks.backward:
            if leaving is not None:
                clocks.wait(leaving)
                if not held:
                    clocks.local(len(rounds[i - 1]) * grads + 2 * sums)
            leaving = send_back(i)
    if leaving is not None:
        if shape.splits_own:
            clocks.step([of_rank[-1] for of_rank in steps])
        clocks.wait(leaving)
        clocks.local(((world - 1) if held else len(rounds[-1])) * grads + sums + grads)


@lru_cache(maxsize=64)
def _chunks_seen(shape: AttentionShape) -> dict[int, list[int]]:
    """Return, by distance, the chunks of keys that each rank attends to there."""
    return {d: chunks_at(shape.layout, shape.mask, d) for d in range(1, shape.world_size)}


def _allgather(clocks: Clocks) -> None:
    shape = clocks.shape
    groups, world = shape.head_groups, shape.world_size
    steps = [allgather_steps(shape, rank) for rank in range(world)]
    kv = shape.kv_bytes // len(groups)
    grads, part = shape.grad_bytes // len(groups), shape.part_bytes / len(groups)
    everyone = range(world)
    segments = gather_segments(shape.layout, shape.mask, everyone, everyone)
    received = max(parts_received(segments, world)) * part
    sent = max(parts_sent(segments, world)) * part

    def gather() -> list[float]:
        clocks.local(2 * kv)
        return clocks.gather(kv, [everyone])

    arriving = gather()
    first = len(steps[0]) - len(groups)
    if first:
        clocks.step([of_rank[0] for of_rank in steps])
    leaving: list[float] | None = None

    def arrive() -> None:
        if leaving is not None:
            clocks.wait(leaving)
            clocks.local(received + 2 * grads)

    for group in range(len(groups)):
        clocks.wait(arriving)
        if group + 1 < len(groups):
            arriving = gather()
        clocks.step([of_rank[first + group] for of_rank in steps])
        if clocks.backward:
            arrive()
            leaving = clocks.all_to_all([sent], [everyone])
    arrive()


def _hierarchical(clocks: Clocks) -> None:
    shape = clocks.shape
    nodes, world = shape.num_nodes, shape.world_size
    size = world // nodes
    steps = [hierarchical_steps(shape, rank) for rank in range(world)]
    kv, sums = shape.kv_bytes, shape.kv_sum_bytes
    inside = [range(node * size, (node + 1) * size) for node in range(nodes)]

    def gather() -> list[float]:
        clocks.local(2 * kv)
        return clocks.gather(kv, inside)

    def ring() -> list[float]:
        return clocks.exchange([(size, [kv] * world)])

    clocks.local(2 * kv)
    gathering = gather()
    arriving = ring() if nodes > 1 else None
    first = len(steps[0]) - nodes
    if first:
        clocks.step([of_rank[0] for of_rank in steps])
    parts: list[float] | None = None
    returning: list[float] | None = None
    received = 0.0

    def pass_on(j: int) -> list[float] | None:
        """Sum the parts of node step j and send the sum to its owner."""
        if parts is None:
            return None
        clocks.wait(parts)
        clocks.local(received + sums)
        if j == 0:
            return None
        if returning is not None:
            clocks.wait(returning)
            clocks.local(3 * sums)
        return clocks.exchange([(-j * size, [sums] * world)])

    for node in range(nodes):
        clocks.wait(gathering)
        if arriving is not None:
            clocks.wait(arriving)
            gathering = gather()
        arriving = ring() if node + 2 < nodes else None
        clocks.step([of_rank[first + node] for of_rank in steps])
        if clocks.backward:
            returning = pass_on(node - 1)
            keys = [inside[(i - node) % nodes] for i in range(nodes)]
            segments = [
                gather_segments(shape.layout, shape.mask, *pair)
                for pair in zip(inside, keys, strict=True)
            ]
            most = [max(parts_sent(one, size)) * shape.part_bytes for one in segments]
            received = max(max(parts_received(one, size)) for one in segments) * shape.part_bytes
            parts = clocks.all_to_all(most, inside)
    if clocks.backward:
        last = pass_on(nodes - 1)
        if last is not None:
            clocks.wait(last)
            clocks.local(3 * sums)
        clocks.local(sums + shape.grad_bytes)


def _shares_heads(rotation: str) -> Callable[[Clocks], None]:
    """Return the schedule of a rotation of `SHARE_HEADS`: the ring that is left, and exchanges."""

    def schedule(clocks: Clocks) -> None:
        shape = clocks.shape
        world, node_size = shape.world_size, shape.node_size
        sharing, left = sharing_ranks(rotation, world, node_size), shape_left(rotation, shape)
        rings = sorted(
            {ring_ranks(rotation, rank, world, node_size) for rank in range(world)},
            key=lambda ring: ring.start,
        )
        inner = world if node_size is None else node_size
        groups = [range(start, start + sharing) for start in range(0, world, sharing)]
        busiest = sharing - 1
        if rotation == "hybrid_context_first":
            # A rank's parts go to one rank of each node, whichever it is, but all that comes to a
            # rank is from one node: the NICs of most get all of it.
            groups = [range(i, world, inner) for i in range(inner)]
            busiest = max(
                sum(other // inner != rank // inner for other in ends)
                for rank in range(world)
                for ends in partners(rotation, rank, world, node_size)
            )

        def exchange(num_bytes: float) -> None:
            if sharing > 1:
                clocks.local(2 * num_bytes, 2 * num_bytes)
                sent = num_bytes * busiest / sharing
                clocks.wait(clocks.all_to_all([sent] * len(groups), groups))

        # kv heads that are on several ranks as often as they travel.
        out, kv = left.q_bytes, left.kv_bytes
        exchange(out if clocks.backward else out + kv)
        if left.world_size > 1:
            ring = clocks.ring(left, rings)
            _p2p(ring)
            clocks.after_ring(ring, rings)
        else:
            seconds = single_seconds(left, clocks.calibration, clocks.setting.direction)
            clocks.steps.append(seconds)
            clocks.calls([1] * world, [seconds] * world)
        exchange(out + left.grad_bytes if clocks.backward else out)

    return schedule


SCHEDULES: dict[str, Callable[[Clocks], None]] = {
    "allgather": _allgather,
    "p2p": _p2p,
    "hierarchical": _hierarchical,
    **{name: _shares_heads(name) for name in SHARE_HEADS},
}
"""What the model knows."""
