"""Each rotation's schedule, played on clocks.

The functions mirror lhcp/ring/rotation file by file: what is posted when, what waits for what. They
decide nothing; `lhcp.cost.cost_model` asks them for times.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from lhcp.cost.clocks import Clocks, single_seconds
from lhcp.ring.parts import Segment, gather_segments
from lhcp.ring.rotation.p2p import holds_all_parts
from lhcp.ring.schedule import (
    allgather_steps,
    hierarchical_steps,
    p2p_steps,
    ring_rounds,
    round_chunks,
)


def parts_received(plan: Sequence[Segment], num_ranks: int) -> list[int]:
    """Chunks of which each rank gets parts, its own among them."""
    return [sum(len(segment.givers(rank)) for segment in plan) for rank in range(num_ranks)]


def parts_sent(plan: Sequence[Segment], num_ranks: int) -> list[int]:
    """Chunks of which each rank gives parts to other ranks."""
    sent = []
    for rank in range(num_ranks):
        runs = [segment.runs[rank] for segment in plan]
        sent.append(sum(stop - start - (start <= rank < stop) for start, stop in runs))
    return sent


def _p2p(clocks: Clocks) -> None:
    s = clocks.sizes
    world = s.world_size
    rounds = ring_rounds(world, s.ring_pairs)
    steps = [
        p2p_steps(rank, s.cut, s.causal, s.num_kv_heads, rounds, clocks.backward)
        for rank in range(world)
    ]
    kv, sums = s.kv_elements * s.element_bytes, s.kv_elements * s.grad_bytes
    held = holds_all_parts(world, kv)

    def seen(rank: int, distance: int) -> float:
        """Bytes of the keys that a rank attends to at a distance."""
        one = range(distance, distance + 1)
        return float(len(round_chunks(rank % world, s.cut, s.causal, one)) * s.chunk_bytes)

    def exchange(i: int, home: bool) -> list[float]:
        """Fetch the keys of a round, or send their gradients home."""
        done = list(clocks.now)
        for d in rounds[i]:

            def num_bytes(sender: int, d: int = d) -> float:
                return seen(sender if home else sender + d, d)

            def before(rank: int, d: int = d) -> int:
                return (rank + d if home else rank - d) % world

            done = list(map(max, done, clocks.exchange(num_bytes, before)))
        return done

    coming = exchange(0, home=False)
    leaving: list[float] | None = None
    clocks.step([of_rank[0] for of_rank in steps])
    for i in range(len(rounds)):
        clocks.wait(coming)
        if i + 1 < len(rounds):
            coming = exchange(i + 1, home=False)
        clocks.step([of_rank[i + 1] for of_rank in steps])
        if clocks.backward:
            if leaving is not None:
                clocks.wait(leaving)
                if not held:
                    clocks.local(len(rounds[i - 1]) * kv + 2 * sums)
            leaving = exchange(i, home=True)
    if leaving is not None:
        clocks.wait(leaving)
        clocks.local(((world - 1) if held else len(rounds[-1])) * kv + sums + kv)


def _allgather(clocks: Clocks) -> None:
    s = clocks.sizes
    groups, world = s.head_groups, s.world_size
    steps = [allgather_steps(rank, s.cut, s.causal, groups) for rank in range(world)]
    kv = s.kv_elements * s.element_bytes // len(groups)
    chunk = s.chunk_bytes / len(groups)
    everyone = range(world)
    plan = gather_segments(s.cut, s.causal, everyone, everyone)

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
            clocks.local(max(parts_received(plan, world)) * chunk + 2 * kv)

    for group in range(len(groups)):
        clocks.wait(arriving)
        if group + 1 < len(groups):
            arriving = gather()
        clocks.step([of_rank[first + group] for of_rank in steps])
        if clocks.backward:
            arrive()
            most = max(parts_sent(plan, world)) * chunk
            leaving = clocks.all_to_all([most], [everyone])
    arrive()


def _hierarchical(clocks: Clocks) -> None:
    s = clocks.sizes
    nodes = s.num_nodes
    size = s.world_size // nodes
    steps = [
        hierarchical_steps(rank, s.cut, s.causal, s.num_kv_heads, size)
        for rank in range(s.world_size)
    ]
    kv, sums = s.kv_elements * s.element_bytes, s.kv_elements * s.grad_bytes
    inside = [range(node * size, (node + 1) * size) for node in range(nodes)]

    def gather() -> list[float]:
        clocks.local(2 * kv)
        return clocks.gather(kv, inside)

    def ring() -> list[float]:
        return clocks.exchange(lambda _: kv, lambda rank: (rank - size) % s.world_size)

    clocks.local(2 * kv)
    gathering = gather()
    arriving = ring() if nodes > 1 else None
    first = len(steps[0]) - nodes
    if first:
        clocks.step([of_rank[0] for of_rank in steps])
    parts: list[float] | None = None
    homeward: list[float] | None = None
    received = 0.0

    def pass_on(j: int) -> list[float] | None:
        """Sum the parts of node step j and send the sum to its owner."""
        if parts is None:
            return None
        clocks.wait(parts)
        clocks.local(received + sums)
        if j == 0:
            return None
        if homeward is not None:
            clocks.wait(homeward)
            clocks.local(3 * sums)
        back = j * size
        return clocks.exchange(lambda _: sums, lambda rank: (rank + back) % s.world_size)

    for node in range(nodes):
        clocks.wait(gathering)
        if arriving is not None:
            clocks.wait(arriving)
            gathering = gather()
        arriving = ring() if node + 2 < nodes else None
        clocks.step([of_rank[first + node] for of_rank in steps])
        if clocks.backward:
            homeward = pass_on(node - 1)
            keys = [inside[(i - node) % nodes] for i in range(nodes)]
            plans = [
                gather_segments(s.cut, s.causal, *pair) for pair in zip(inside, keys, strict=True)
            ]
            most = [max(parts_sent(plan, size)) * s.chunk_bytes for plan in plans]
            received = max(max(parts_received(plan, size)) for plan in plans) * s.chunk_bytes
            parts = clocks.all_to_all(most, inside)
    if clocks.backward:
        last = pass_on(nodes - 1)
        if last is not None:
            clocks.wait(last)
            clocks.local(3 * sums)
        clocks.local(sums + kv)


def _alltoall(clocks: Clocks) -> None:
    s = clocks.sizes
    qkv = (s.q_elements + s.kv_elements) * s.element_bytes
    out = s.q_elements * s.element_bytes
    order = (out, qkv) if clocks.backward else (qkv, out)
    seconds = single_seconds(
        replace(s, num_heads=max(1, s.num_heads // s.world_size)),
        clocks.calibration,
        clocks.direction,
    )
    everyone = range(s.world_size)
    for i, num_bytes in enumerate(order):
        clocks.local(2 * num_bytes, 2 * num_bytes)
        sent = num_bytes * (s.world_size - 1) / s.world_size
        clocks.wait(clocks.all_to_all([sent], [everyone]))
        if i == 0:
            clocks.steps.append(seconds)
            clocks.work([seconds] * s.world_size)


SCHEDULES: dict[str, Callable[[Clocks], None]] = {
    "p2p": _p2p,
    "allgather": _allgather,
    "hierarchical": _hierarchical,
    "alltoall": _alltoall,
}
