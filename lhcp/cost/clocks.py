"""Clocks to play the schedule of one attention on: one a rank, links between them.

A link carries one message at a time. What the host launches begins once it has; it goes ahead of
the clock, or the clock waits for it. Where moving bytes takes compute from a rank, its own goes on
more slowly beside a message; while it waits it loses nothing. `lhcp.cost.schedules` plays the
rotations, and `lhcp.cost.choose` asks it for times.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from lhcp.cost.calibration import BlockSize, Calibration, Direction, Link
from lhcp.ring.schedule import Step
from lhcp.ring.shape import AttentionShape


def single_seconds(shape: AttentionShape, calibration: Calibration, direction: Direction) -> float:
    """Return T1, the seconds of the whole sequence on one device."""
    heads, length = shape.num_heads * shape.batch, shape.seqlen
    size = BlockSize(length, length, shape.mask, heads, shape.head_dim)
    return calibration.block_seconds(direction, size)


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


class Setting(NamedTuple):
    """What is played: one direction of one attention on one machine."""

    shape: AttentionShape
    calibration: Calibration
    direction: Direction


class Clocks:
    """One clock a rank, and links that carry one message after another.

    Args:
        compute: whether compute takes time; communicate: whether messages do.
    """

    def __init__(self, setting: Setting, *, compute: bool, communicate: bool) -> None:
        self.setting = setting
        self.shape, self.calibration, _ = setting
        self.backward = setting.direction == "backward"
        self._compute, self._communicate = compute, communicate
        world = self.shape.world_size
        self.now = [0.0] * world
        self._host = [0.0] * world
        """When each rank's host is done with what it launched so far."""
        self._inner = self.calibration.inner
        self._outer = self.calibration.across(self.shape.node_size)
        self._free = {"inner": [0.0] * world, "outer": [0.0] * world}
        self._nodes = [rank // (self.shape.node_size or world) for rank in range(world)]
        self._messages: list[list[Message]] = [[] for _ in range(world)]
        self._step_seconds: dict[Step, float] = {}
        self.steps: list[float] = []
        """The slowest rank's compute at each step."""

    @property
    def seconds(self) -> float:
        """When the slowest rank is done."""
        return max(self.now)

    def work(self, seconds: Sequence[float]) -> None:
        """Let every rank compute for so long."""
        if self._compute:
            self._compute_for(seconds)

    def local(self, *passes: float) -> None:
        """Let every rank make elementwise passes over so many bytes; this is part of M as well."""
        self._launch([self.calibration.host.launch * len(passes)] * self.shape.world_size)
        seconds = sum(self.calibration.copy_seconds(b) for b in passes)
        self._compute_for([seconds] * self.shape.world_size)

    def step(self, steps: Sequence[Step]) -> None:
        """Let every rank compute its own step's calls and merge them."""
        known = self._step_seconds
        for step in set(steps).difference(known):
            known[step] = step_seconds(step, self.setting)
        seconds = [known[step] for step in steps]
        self.steps.append(max(seconds))
        self.calls([len(step.calls) for step in steps], seconds)

    def calls(self, counts: Sequence[int], seconds: Sequence[float]) -> None:
        """Let every rank launch so many calls, the first of which begins once it is launched."""
        if not self._compute:
            return
        call = self.calibration.host.call
        self._launch([call * min(count, 1) for count in counts])
        self._compute_for(seconds)
        self._launch([call * max(count - 1, 0) for count in counts])

    def exchange(self, messages: Sequence[tuple[int, Sequence[float]]]) -> list[float]:
        """Post messages together, and say when each rank's are there.

        Args:
            messages: (back, num_bytes): num_bytes[r] to each rank r from the rank `back` before it.
        """
        done = list(self.now)
        if not self._communicate:
            return done
        self._post()
        done = list(self.now)
        for back, num_bytes in messages:
            if back % len(done):
                self._exchange(back, num_bytes, done)
        return done

    def _exchange(self, back: int, num_bytes: Sequence[float], done: list[float]) -> None:
        now, nodes = self.now, self._nodes
        links = ((self._inner, self._free["inner"]), (self._outer, self._free["outer"]))
        shared = self.calibration.byte_compute > 0
        for rank, moved in enumerate(num_bytes):
            if not moved:
                continue
            sender = (rank - back) % len(now)
            link, free = links[nodes[sender] != nodes[rank]]
            start = max(now[sender], now[rank], free[sender])
            busy = moved / link.bandwidth
            free[sender] = start + busy
            arrived = start + busy + link.latency
            for end in (sender, rank):
                if shared:
                    self._share(end, start, busy, moved)
                if arrived > done[end]:
                    done[end] = arrived

    def gather(self, own_bytes: float, groups: Sequence[range]) -> list[float]:
        """Post ring gathers in each group: every rank moves the others' `own_bytes`."""
        moved = [(len(group) - 1) * own_bytes for group in groups]
        # Rings that cross nodes use every rank's NIC, each for a part of the bytes.
        shares = [1 / self._of_a_node(group) for group in groups]
        return self._collective(groups, moved, shares, lambda link: link.gather_factor)

    def all_to_all(self, most_bytes: Sequence[float], groups: Sequence[range]) -> list[float]:
        """Post all-to-alls in each group, whose busiest rank moves `most_bytes`."""
        # What is for another node goes over the rank's own NIC.
        shares = [
            (len(group) - self._of_a_node(group)) / max(len(group) - 1, 1) for group in groups
        ]
        return self._collective(groups, most_bytes, shares, lambda link: link.alltoall_factor)

    def _of_a_node(self, group: range) -> int:
        """Count the ranks of a group that share a node."""
        return len(group) // len({self._nodes[rank] for rank in group})

    def _collective(
        self,
        groups: Sequence[range],
        moved: Sequence[float],
        shares: Sequence[float],
        factor: Callable[[Link], float],
    ) -> list[float]:
        """Post a collective in each group.

        Args:
            shares: of the bytes, what each NIC moves. factor: of the time of so many bytes.
        """
        if not self._communicate:
            return list(self.now)
        if all(len(group) == 1 for group in groups):
            return list(self.now)
        self._post()
        ready, done = list(self.now), list(self.now)
        for group, num_bytes, share in zip(groups, moved, shares, strict=True):
            if len(group) == 1:
                continue
            link, name = self._inner, "inner"
            busy = factor(link) * num_bytes / link.bandwidth
            if self._of_a_node(group) < len(group):
                link, name = self._outer, "outer"
                busy = max(busy, factor(link) * share * num_bytes / link.bandwidth)
            latency = link.collective_latency(len(group))
            start = max(max(ready[r], self._free[name][r]) for r in group)
            for rank in group:
                self._free[name][rank] = start + busy
                # As much comes as goes.
                self._share(rank, start, busy, 2 * num_bytes)
                done[rank] = start + busy + latency
        return done

    def ring(self, shape: AttentionShape, rings: Sequence[range]) -> "Clocks":
        """Return clocks of one of these equal rings, each of which begins when the last does."""
        # A rank's NIC is its own, or shared as it is here.
        calibration = replace(self.calibration, outer=self._outer, nics=None)
        one = Clocks(
            self.setting._replace(shape=shape, calibration=calibration),
            compute=self._compute,
            communicate=self._communicate,
        )
        one.now, one._host = (
            [max(of_ranks[r] for r in place) for place in zip(*rings, strict=True)]
            for of_ranks in (self.now, self._host)
        )
        return one

    def after_ring(self, one: "Clocks", rings: Sequence[range]) -> None:
        """Let every rank be where its place of a ring is."""
        self.steps += one.steps
        for ranks in rings:
            for place, rank in enumerate(ranks):
                self.now[rank], self._host[rank] = one.now[place], one._host[place]

    def wait(self, done: Sequence[float]) -> None:
        """Let every rank stand still until what it waits for is there."""
        self.now = [max(t, d) for t, d in zip(self.now, done, strict=True)]

    def _post(self) -> None:
        """Let every host post a batch of messages."""
        self._launch([self.calibration.host.message] * len(self.now))

    def _launch(self, seconds: Sequence[float]) -> None:
        """Let the hosts take so long; what they launch next, or launched, is not done before."""
        self._host = [t + s for t, s in zip(self._host, seconds, strict=True)]
        self.now = [max(pair) for pair in zip(self.now, self._host, strict=True)]

    def _compute_for(self, seconds: Sequence[float]) -> None:
        if self.calibration.byte_compute <= 0:
            self.now = [t + s for t, s in zip(self.now, seconds, strict=True)]
            return
        ranks = zip(self.now, self._messages, strict=True)
        self._messages = [[m for m in messages if m.stop > t] for t, messages in ranks]
        ends = zip(self.now, seconds, self._messages, strict=True)
        self.now = [finish(*end) for end in ends]

    def _share(self, rank: int, start: float, busy: float, num_bytes: float) -> None:
        """Charge a rank for bytes that it sends or receives while it computes."""
        seconds = self.calibration.byte_compute * num_bytes
        if seconds > 0:
            self._messages[rank].append(Message(start, start + busy, seconds / busy))


def step_seconds(step: Step, setting: Setting) -> float:
    """Return the seconds of one step's calls on one rank, with their part of the merge."""
    shape, calibration, direction = setting
    kv_heads = step.heads[1] - step.heads[0]
    heads = kv_heads * shape.num_heads // shape.num_kv_heads
    seconds = 0.0
    for call in step.calls:
        rows, chunks = step.of_chunk(shape.chunk), call.q[1] - call.q[0]
        queries, keys, batch = chunks * rows, call.num_keys * rows, shape.batch
        if call.per_chunk:
            queries, keys, batch = shape.chunk, shape.chunk, shape.batch * chunks
        # Calls of other heads run beside this one, so that a few heads fill a GPU as all do.
        size = BlockSize(queries, keys, call.mask, shape.num_heads * batch, shape.head_dim)
        whole = calibration.block_seconds(direction, size)
        # Beside the kernel itself, one small one in the forward and two in the backward.
        small = calibration.launch * (1 if direction == "forward" else 2)
        seconds += whole * heads / shape.num_heads + small
        # A partial result is read once; the sum is written once, and wide again and again where
        # so much is held.
        num_bytes = queries * batch * heads * shape.head_dim * shape.element_bytes
        wide = shape.q_elements * shape.sum_bytes
        moved = num_bytes + 2 * wide * (num_bytes / shape.tuning.held_bytes)
        if step.first:
            moved += num_bytes
        seconds += calibration.merge_seconds(moved)
    return seconds
