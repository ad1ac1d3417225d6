"""Sizes of one attention, and clocks to play its schedule on: one a rank, links between them.

A link carries one message at a time. Where moving bytes takes compute from a rank, its own goes on
more slowly beside a message; while it waits it loses nothing. `lhcp.cost.schedules` plays the
rotations, and `lhcp.cost.cost_model` asks it for times.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lhcp.comm.layout import Layout, LayoutName, make_layout
from lhcp.cost.calibration import Calibration, Direction, Link
from lhcp.ring.rotation.allgather import head_groups
from lhcp.ring.rotation.base import HELD_BYTES
from lhcp.ring.schedule import Step


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
    """Bytes of an element of a sum over calls or ranks; 8 for float64."""
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
        query_rows = self.batch * self.chunk * self.num_heads
        return head_groups(self.num_kv_heads, query_rows, gathered, self.world_size)

    @property
    def ring_pairs(self) -> int:
        """Queries x keys x heads that a rank computes for one distance of the ring."""
        return self.batch * (self.seqlen // self.world_size) * self.chunk * self.num_heads

    @property
    def chunk_bytes(self) -> int:
        """Bytes of k and v, or of parts of their gradients, of one chunk."""
        return self.kv_elements // self.cut.chunks_per_rank * self.element_bytes


def single_seconds(sizes: Sizes, calibration: Calibration, direction: Direction) -> float:
    """T1: the whole sequence on one device."""
    heads = sizes.num_heads * sizes.batch
    return calibration.block_seconds(
        direction, sizes.seqlen, sizes.seqlen, sizes.causal, heads, sizes.head_dim
    )


class Message(NamedTuple):
    """A message as one of its ends sees it."""

    start: float
    stop: float
    share: float
    """Of the end's compute, which it takes while it is under way."""


MOST_SHARED = 0.9
"""Messages under way at once take at most so much of a rank's compute: what is done beside them
ends no later than if it waited for them."""


def finish(now: float, seconds: float, messages: Sequence[Message]) -> float:
    """Return when so many seconds of compute that start now end, beside one rank's messages."""
    edges = sorted({edge for m in messages for edge in (m.start, m.stop) if edge > now})
    for edge in edges:
        shared = sum(m.share for m in messages if m.start <= now < m.stop)
        rate = 1 - min(shared, MOST_SHARED)
        if (edge - now) * rate >= seconds:
            return now + seconds / rate
        now, seconds = edge, seconds - (edge - now) * rate
    return now + seconds


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
        self._messages: list[list[Message]] = [[] for _ in range(sizes.world_size)]
        self.steps: list[float] = []

    @property
    def seconds(self) -> float:
        return max(self.now)

    def work(self, seconds: Sequence[float]) -> None:
        """Every rank computes for so long."""
        if self._compute:
            self._compute_for(seconds)

    def local(self, *passes: float) -> None:
        """Every rank makes elementwise passes over so many bytes, which is part of M as well."""
        seconds = sum(self.calibration.copy_seconds(b) for b in passes)
        self._compute_for([seconds] * self.sizes.world_size)

    def step(self, steps: Sequence[Step]) -> None:
        """Every rank computes its own step's calls and merges them."""
        seconds = [step_seconds(s, self.sizes, self.calibration, self.direction) for s in steps]
        self.steps.append(max(seconds))
        self.work(seconds)

    def exchange(
        self, num_bytes: Callable[[int], float], before: Callable[[int], int]
    ) -> list[float]:
        """Post num_bytes(sender) from rank before(r) to each rank r; return when each is there."""
        ready, free, done = list(self.now), self._free, list(self.now)
        if not self._communicate:
            return ready
        for rank in range(self.sizes.world_size):
            sender = before(rank)
            if sender == rank or not num_bytes(sender):
                continue
            name, link = self._link(sender, rank)
            start = max(ready[sender], ready[rank], free[name][sender])
            busy = num_bytes(sender) / link.bandwidth
            free[name][sender] = start + busy
            for end in (sender, rank):
                self._share(end, start, busy, num_bytes(sender))
                done[end] = max(done[end], start + busy + link.latency)
        return done

    def gather(self, own_bytes: float, groups: Sequence[range]) -> list[float]:
        """Post ring gathers in each group: every rank moves the others' `own_bytes`."""
        factor = self.calibration.gather_factor
        return self._collective({group: factor * (len(group) - 1) * own_bytes for group in groups})

    def all_to_all(self, most_bytes: Sequence[float], groups: Sequence[range]) -> list[float]:
        """Post all-to-alls in each group, whose busiest rank moves `most_bytes`."""
        factor = self.calibration.alltoall_factor
        moved = [factor * num_bytes for num_bytes in most_bytes]
        return self._collective(dict(zip(groups, moved, strict=True)))

    def _collective(self, moved: dict[range, float]) -> list[float]:
        ready, done = list(self.now), list(self.now)
        if not self._communicate:
            return ready
        for group, num_bytes in moved.items():
            if len(group) == 1:
                continue
            nodes = len({self._node(rank) for rank in group})
            link, name = self.calibration.inner, "inner"
            busy = num_bytes / link.bandwidth
            if nodes > 1:
                # Rings that cross nodes use every rank's link, each a part of the bytes.
                link, name = self.calibration.outer, "outer"
                busy = max(busy, num_bytes / (len(group) // nodes) / link.bandwidth)
            latency = link.collective_latency(len(group))
            start = max(max(ready[r], self._free[name][r]) for r in group)
            for rank in group:
                self._free[name][rank] = start + busy
                # As much comes as goes.
                self._share(rank, start, busy, 2 * num_bytes)
                done[rank] = start + busy + latency
        return done

    def wait(self, done: Sequence[float]) -> None:
        self.now = [max(t, d) for t, d in zip(self.now, done, strict=True)]

    def _compute_for(self, seconds: Sequence[float]) -> None:
        ranks = zip(self.now, self._messages, strict=True)
        self._messages = [[m for m in messages if m.stop > t] for t, messages in ranks]
        ends = zip(self.now, seconds, self._messages, strict=True)
        self.now = [finish(*end) for end in ends]

    def _share(self, rank: int, start: float, busy: float, num_bytes: float) -> None:
        """Charge a rank for bytes that it sends or receives while it computes."""
        seconds = self.calibration.byte_compute * num_bytes
        if seconds > 0:
            self._messages[rank].append(Message(start, start + busy, seconds / busy))

    def _node(self, rank: int) -> int:
        return 0 if self.sizes.node_size is None else rank // self.sizes.node_size

    def _link(self, a: int, b: int) -> tuple[str, Link]:
        inside = self._node(a) == self._node(b)
        return ("inner", self.calibration.inner) if inside else ("outer", self.calibration.outer)


def step_seconds(
    step: Step,
    sizes: Sizes,
    calibration: Calibration,
    direction: Direction,
) -> float:
    """Seconds of one step's calls on one rank, with their part of the merge."""
    kv_heads = step.heads[1] - step.heads[0]
    heads = kv_heads * sizes.num_heads // sizes.num_kv_heads
    seconds = 0.0
    for call in step.calls:
        chunks, keys = call.q[1] - call.q[0], call.num_keys * sizes.chunk
        queries, batch = chunks * sizes.chunk, sizes.batch
        if call.per_chunk:
            queries, keys, batch = sizes.chunk, sizes.chunk, sizes.batch * chunks
        # Calls of other heads run beside this one, so that a few heads fill a GPU as all do.
        whole = calibration.block_seconds(
            direction, queries, keys, call.causal, sizes.num_heads * batch, sizes.head_dim
        )
        # Beside the kernel itself, one small one in the forward and two in the backward.
        small = calibration.launch * (1 if direction == "forward" else 2)
        seconds += whole * heads / sizes.num_heads + small
        # A partial result is read once; the sum is written once, and wide again and again where
        # so much is held.
        num_bytes = queries * batch * heads * sizes.head_dim * sizes.element_bytes
        wide = sizes.q_elements * sizes.grad_bytes
        moved = num_bytes + 2 * wide * (num_bytes / HELD_BYTES)
        if step.first:
            moved += num_bytes
        seconds += calibration.merge_seconds(moved)
    return seconds
