"""Each rotation's schedule on clocks, one a rank, with links that carry one message at a time.

The functions at the end mirror lhcp/ring/rotation file by file: what is posted when, what waits for
what. They decide nothing; `lhcp.cost_model` asks them for times.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lhcp.calibration import Calibration, Direction, Link
from lhcp.layout import Layout, LayoutName, make_layout
from lhcp.ring.rotation.allgather import head_groups
from lhcp.ring.schedule import Call, Step, allgather_steps, hierarchical_steps, p2p_steps


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Everything about one attention that is known before it runs."""

    seqlen: int
    """S, tokens or entries of all ranks together."""
    world_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    batch: int = 1
    element_bytes: int = 2
    """Bytes of an element of q, k, v."""
    grad_bytes: int = 4
    """Bytes of an element of dk, dv on the wire; 8 for float64."""
    layout: LayoutName = "zigzag"
    causal: bool = True
    node_size: int | None = None
    """Ranks of one node; None where all ranks are on one."""

    @property
    def cut(self) -> Layout:
        return make_layout(self.layout, self.world_size)

    @property
    def chunk(self) -> int:
        """Tokens of one chunk."""
        return self.seqlen // self.cut.num_chunks

    @property
    def num_nodes(self) -> int:
        return 1 if self.node_size is None else self.world_size // self.node_size

    @property
    def kv_elements(self) -> int:
        """Elements of one rank's k and v."""
        return 2 * self.batch * (self.seqlen // self.world_size) * self.num_kv_heads * self.head_dim

    @property
    def q_elements(self) -> int:
        """Elements of one rank's q."""
        return self.batch * (self.seqlen // self.world_size) * self.num_heads * self.head_dim

    @property
    def head_groups(self) -> tuple[tuple[int, int], ...]:
        """Runs of kv heads that `allgather` gathers one after another."""
        gathered = self.kv_elements * self.element_bytes * self.world_size
        return head_groups(self.num_kv_heads, self.chunk, gathered)


def single_seconds(sizes: Sizes, calibration: Calibration, direction: Direction) -> float:
    """T1: the whole sequence on one device."""
    heads = sizes.num_heads * sizes.batch
    return calibration.block_seconds(
        direction, sizes.seqlen, sizes.seqlen, sizes.causal, heads, sizes.head_dim
    )


class Clocks:
    """One clock a rank, and links that carry one message after another."""

    def __init__(
        self,
        sizes: Sizes,
        calibration: Calibration,
        direction: Direction,
        compute: bool,
        communicate: bool,
    ) -> None:
        self.sizes, self.calibration, self.direction = sizes, calibration, direction
        self.backward = direction == "backward"
        self._compute, self._communicate = compute, communicate
        self.now = [0.0] * sizes.world_size
        self._free = {
            "inner": [0.0] * sizes.world_size,
            "outer": [0.0] * sizes.world_size,
        }
        self.steps: list[float] = []

    @property
    def seconds(self) -> float:
        return max(self.now)

    def work(self, seconds: Sequence[float]) -> None:
        """Every rank computes for so long."""
        if self._compute:
            self.now = [t + s for t, s in zip(self.now, seconds, strict=True)]

    def local(self, *passes: float) -> None:
        """Every rank makes elementwise passes over so many bytes, which is part of M as well."""
        seconds = sum(self.calibration.copy_seconds(b) for b in passes)
        self.now = [t + seconds for t in self.now]

    def step(self, steps: Sequence[Step]) -> None:
        """Every rank computes its own step's calls and merges them."""
        seconds = [step_seconds(s, self.sizes, self.calibration, self.direction) for s in steps]
        self.steps.append(max(seconds))
        self.work(seconds)

    def exchange(self, num_bytes: float, before: Callable[[int], int]) -> list[float]:
        """Post a message from rank before(r) to each rank r; return when each is there."""
        ready, free, done = list(self.now), self._free, list(self.now)
        if not self._communicate:
            return ready
        for rank in range(self.sizes.world_size):
            sender = before(rank)
            if sender == rank:
                continue
            name, link = self._link(sender, rank)
            start = max(ready[sender], ready[rank], free[name][sender])
            busy = num_bytes / link.bandwidth
            free[name][sender] = start + busy
            for end in (sender, rank):
                done[end] = max(done[end], start + busy + link.latency)
        return done

    def collective(
        self, own_bytes: float, groups: Sequence[range], messages: int, reduce: bool = False
    ) -> list[float]:
        """Post a ring collective in each group: every rank moves the others' `own_bytes`."""
        known = self.calibration
        factor = known.reduce_scatter_factor if reduce else known.gather_factor
        ready, done = list(self.now), list(self.now)
        if not self._communicate:
            return ready
        for group in groups:
            nodes = len({self._node(rank) for rank in group})
            per_node = len(group) // nodes
            link, hops = self.calibration.inner, len(group) - 1
            busy = factor * hops * own_bytes / link.bandwidth
            name = "inner"
            if nodes > 1:
                # Rings that cross nodes use every rank's link, each a part of the bytes.
                link, name = self.calibration.outer, "outer"
                busy = max(busy, factor * hops * own_bytes / per_node / link.bandwidth)
            latency = messages * link.collective_latency(len(group))
            start = max(max(ready[r], self._free[name][r]) for r in group)
            for rank in group:
                self._free[name][rank] = start + busy
                done[rank] = start + busy + latency
        return done

    def wait(self, done: Sequence[float]) -> None:
        self.now = [max(t, d) for t, d in zip(self.now, done, strict=True)]

    def _node(self, rank: int) -> int:
        return 0 if self.sizes.node_size is None else rank // self.sizes.node_size

    def _link(self, a: int, b: int) -> tuple[str, Link]:
        inside = self._node(a) == self._node(b)
        return ("inner", self.calibration.inner) if inside else ("outer", self.calibration.outer)


def step_seconds(step: Step, sizes: Sizes, calibration: Calibration, direction: Direction) -> float:
    """Seconds of one step's calls on one rank, with their merges."""
    kv_heads = step.heads[1] - step.heads[0]
    heads = kv_heads * sizes.num_heads // sizes.num_kv_heads
    return sum(
        _call_seconds(c, step, heads, kv_heads, sizes, calibration, direction) for c in step.calls
    )


def _call_seconds(
    call: Call,
    step: Step,
    heads: int,
    kv_heads: int,
    sizes: Sizes,
    calibration: Calibration,
    direction: Direction,
) -> float:
    chunks = call.q[1] - call.q[0]
    queries, keys = chunks * sizes.chunk, (call.kv[1] - call.kv[0]) * sizes.chunk
    batch = sizes.batch
    if call.per_chunk:
        queries, keys, batch = sizes.chunk, sizes.chunk, sizes.batch * chunks
    seconds = calibration.block_seconds(
        direction, queries, keys, call.causal, heads * batch, sizes.head_dim
    )
    rows = queries * batch * sizes.head_dim
    # A partial result is read narrow, the sum written wide, and read as well unless it is new.
    per_element = sizes.element_bytes + sizes.grad_bytes * (1 if step.first else 2)
    seconds += calibration.merge_seconds(rows * heads * per_element)
    if direction == "backward":
        per_element = sizes.element_bytes + 2 * sizes.grad_bytes
        kv_rows = keys * batch * sizes.head_dim * kv_heads
        seconds += 2 * calibration.merge_seconds(kv_rows * per_element)
    return seconds


def _p2p(clocks: Clocks) -> None:
    s = clocks.sizes
    world = s.world_size
    steps = [p2p_steps(rank, s.cut, s.causal, s.num_kv_heads) for rank in range(world)]
    kv, grads = s.kv_elements * s.element_bytes, s.kv_elements * s.grad_bytes

    def send(num_bytes: int) -> list[float]:
        return clocks.exchange(num_bytes, lambda rank: (rank - 1) % world)

    homeward: list[float] | None = None
    clocks.local(2 * kv)
    for i in range(world):
        arriving = send(kv) if i + 1 < world else None
        clocks.step([of_rank[i] for of_rank in steps])
        if clocks.backward:
            if homeward is not None:
                clocks.wait(homeward)
            homeward = send(grads)
        if arriving is not None:
            clocks.wait(arriving)
    if homeward is not None:
        clocks.wait(homeward)
        clocks.local(kv + grads)


def _allgather(clocks: Clocks) -> None:
    s = clocks.sizes
    groups = s.head_groups
    steps = [allgather_steps(rank, s.cut, s.causal, groups) for rank in range(s.world_size)]
    kv = s.kv_elements * s.element_bytes // len(groups)
    grads = s.kv_elements * s.grad_bytes // len(groups)
    everyone = [range(s.world_size)]
    messages = 2 * s.cut.chunks_per_rank

    def gather() -> list[float]:
        clocks.local(2 * kv)
        return clocks.collective(kv, everyone, messages)

    arriving = gather()
    first = len(steps[0]) - len(groups)
    if first:
        clocks.step([of_rank[0] for of_rank in steps])
    leaving = []
    for group in range(len(groups)):
        clocks.wait(arriving)
        if group + 1 < len(groups):
            arriving = gather()
        clocks.step([of_rank[first + group] for of_rank in steps])
        if clocks.backward:
            clocks.local(s.world_size * grads)
            leaving.append(clocks.collective(grads, everyone, messages, reduce=True))
    for done in leaving:
        clocks.wait(done)
    if leaving:
        clocks.local(5 * len(groups) * grads)


def _hierarchical(clocks: Clocks) -> None:
    s = clocks.sizes
    nodes = s.num_nodes
    size = s.world_size // nodes
    steps = [
        hierarchical_steps(rank, s.cut, s.causal, s.num_kv_heads, size)
        for rank in range(s.world_size)
    ]
    kv, grads = s.kv_elements * s.element_bytes, s.kv_elements * s.grad_bytes
    inside = [range(node * size, (node + 1) * size) for node in range(nodes)]
    messages = 2 * s.cut.chunks_per_rank

    def send(num_bytes: int) -> list[float]:
        return clocks.exchange(num_bytes, lambda rank: (rank - size) % s.world_size)

    clocks.local(2 * kv)
    gathering = clocks.collective(kv, inside, messages)
    arriving = send(kv) if nodes > 1 else None
    first = len(steps[0]) - nodes
    if first:
        clocks.step([of_rank[0] for of_rank in steps])
    leaving: list[float] | None = None
    homeward: list[float] | None = None
    for node in range(nodes):
        clocks.wait(gathering)
        if arriving is not None:
            clocks.wait(arriving)
            clocks.local(2 * kv)
            gathering = clocks.collective(kv, inside, messages)
        arriving = send(kv) if node + 2 < nodes else None
        clocks.step([of_rank[first + node] for of_rank in steps])
        if clocks.backward:
            clocks.local(size * grads)
            for done in (leaving, homeward):
                if done is not None:
                    clocks.wait(done)
            if leaving is not None:
                homeward = send(grads)
            leaving = clocks.collective(grads, inside, messages, reduce=True)
    if leaving is not None:
        for done in (leaving, homeward):
            if done is not None:
                clocks.wait(done)
        clocks.wait(send(grads))
        clocks.local(3 * grads)


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
    for i, num_bytes in enumerate(order):
        clocks.local(2 * num_bytes, 2 * num_bytes)
        clocks.wait(clocks.collective(num_bytes / s.world_size, [range(s.world_size)], 1))
        if i == 0:
            clocks.steps.append(seconds)
            clocks.work([seconds] * s.world_size)


SCHEDULES: dict[str, Callable[[Clocks], None]] = {
    "p2p": _p2p,
    "allgather": _allgather,
    "hierarchical": _hierarchical,
    "alltoall": _alltoall,
}
