"""Calls side by side: how far steps run ahead of what is finished. Without a GPU."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from lhcp.comm.layout import make_layout
from lhcp.ring import loop, streams
from lhcp.ring.block.base import BackwardInputs
from lhcp.ring.kv import KV
from lhcp.ring.plan import RingPlan
from lhcp.ring.rotation import p2p
from lhcp.ring.rotation.base import Delivery
from lhcp.ring.schedule import Call, Step
from lhcp.ring.shape import FULL, AttentionShape, Tuning
from lhcp.ring.streams import CallStreams
from lhcp.testing.world import world_without_messages
from lhcp.timing import UNTIMED

NUM_STEPS = 5
STEP = Step((Call((0, 1), (0, 1), FULL), Call((1, 2), (0, 1), FULL)), (0, 1), False)
HELD_BYTES = Tuning().held_bytes
SHAPE = AttentionShape(
    seqlen=16, layout=make_layout("zigzag", 8), num_heads=1, num_kv_heads=1, head_dim=4
)


class SideBySide(CallStreams):
    """Streams of a CPU that would have some: calls run at once, steps are left as on a GPU."""

    side_by_side = True  # type: ignore[assignment]


class Deliveries:
    """A rotation of keys without memory."""

    steps = (STEP,) * NUM_STEPS

    def __init__(self, tokens: int) -> None:
        k = torch.empty(1, tokens, 1, 1, dtype=torch.bfloat16, device="meta")
        self._kv = KV(k, k)
        self.step_bytes = 4 * tokens

    def deliver(self) -> Iterator[Delivery]:
        for step in self.steps:
            yield Delivery(step, self._kv)


def events(tokens: int) -> list[tuple[str, int]]:
    """What `_take_steps` starts and finishes, step by step."""
    found: list[tuple[str, int]] = []

    def start(i: int, step: Step, call: Call, kv: KV) -> Call:
        if call == step.calls[0]:
            found.append(("start", i))
        return call

    def finish(i: int, step: Step, results: list[Call]) -> None:
        assert tuple(results) == step.calls
        found.append(("finish", i))

    cpu = torch.device("cpu")
    loop._take_steps(Deliveries(tokens), cpu, SHAPE, start, finish)  # type: ignore[arg-type]
    return found


def most_waiting(found: list[tuple[str, int]]) -> int:
    """Steps that were started and not finished, at most."""
    counts = [sum(1 if what == "start" else -1 for what, _ in found[:n]) for n in range(len(found))]
    return max(counts)


def test_a_cpu_finishes_each_step_before_the_next() -> None:
    """Fails if a CPU would hold results that it has already computed."""
    assert events(64) == [(what, i) for i in range(NUM_STEPS) for what in ("start", "finish")]


@pytest.mark.parametrize("tokens, waiting", [(64, 3), (HELD_BYTES, 2)], ids=["small", "large"])
def test_steps_are_finished_in_order_and_large_ones_sooner(
    monkeypatch: pytest.MonkeyPatch, tokens: int, waiting: int
) -> None:
    """Fails if a step is lost or out of order, or if large keys are held as long as small ones."""
    monkeypatch.setattr(loop, "CallStreams", SideBySide)
    found = events(tokens)
    for what in ("start", "finish"):
        assert [i for event, i in found if event == what] == list(range(NUM_STEPS))
    assert most_waiting(found) == waiting


def test_no_call_runs_on_the_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a call may run on the stream that the program is on, and hold up what follows."""
    monkeypatch.setattr(streams, "_streams", lambda device: ("a", "b", "c"))
    for current, others in (("b", ("a", "c")), ("d", ("a", "b", "c"))):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, current=current: current)
        assert CallStreams(torch.device("cuda"))._streams == others


def posts(rank: int, shape: AttentionShape, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What one rank of a world without messages posts in a backward, in order."""
    found: list[str] = []

    def telling(made: Any) -> Any:
        def make(*args: Any) -> Any:
            found.append(made.__name__)
            return made(*args)

        return make

    world = world_without_messages(rank, shape.world_size)
    with world as ranks, monkeypatch.context() as patch:
        patch.setattr(p2p, "RoundFetch", telling(p2p.RoundFetch))
        patch.setattr(p2p, "RoundReturn", telling(p2p.RoundReturn))
        plan = RingPlan(ranks, shape, "p2p", "math", 1.0)
        q, k, v, out, dout = torch.randn(5, 1, 8, 1, 4)
        lse = torch.zeros(1, 1, 8)
        loop.ring_backward(BackwardInputs(dout, q, KV(k, v), out, lse), plan, UNTIMED)
    return found


@pytest.mark.parametrize("large", [64, 128, 255, 256])
def test_all_ranks_send_in_one_order(monkeypatch: pytest.MonkeyPatch, large: int) -> None:
    """Fails if what a rank fetches decides when it sends gradients: NCCL ranks would hang.

    A round of one distance brings 128 bytes or 256.
    """
    tuning = Tuning(round_length=1, held_bytes=large)
    shape = replace(SHAPE, seqlen=64, element_bytes=4, tuning=tuning)
    monkeypatch.setattr(loop, "CallStreams", SideBySide)
    orders = {tuple(posts(rank, shape, monkeypatch)) for rank in range(8)}
    assert len(orders) == 1
    (order,) = orders
    assert order.count("RoundFetch") == order.count("RoundReturn") == 7
