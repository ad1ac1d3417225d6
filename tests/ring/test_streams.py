"""Calls side by side: how far steps run ahead of what is finished. Without a GPU."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lhcp.comm.layout import make_layout
from lhcp.ring import loop as attention
from lhcp.ring import streams as lanes
from lhcp.ring.rotation import p2p
from lhcp.ring.rotation.base import HELD_BYTES
from lhcp.ring.schedule import Call, Step
from lhcp.ring.streams import Lanes, steps_left
from lhcp.testing.world import world_without_messages
from lhcp.timing import UNTIMED

NUM_STEPS = 5
STEP = Step((Call((0, 1), (0, 1), False), Call((1, 2), (0, 1), False)), (0, 1), False)


class SideBySide(Lanes):
    """Lanes that would have streams: calls run at once, steps are left as on a GPU."""

    def steps_left(self, step_bytes: int) -> int:
        return steps_left(step_bytes)


class Delivery:
    """A rotation of keys without memory."""

    steps = (STEP,) * NUM_STEPS

    def __init__(self, tokens: int) -> None:
        self._k = torch.empty(1, tokens, 1, 1, dtype=torch.bfloat16, device="meta")
        self.step_bytes = 4 * tokens

    def deliver(self, k: Tensor, v: Tensor) -> Iterator[tuple[Step, Tensor, Tensor]]:
        for step in self.steps:
            yield step, self._k, self._k


def events(tokens: int) -> list[tuple[str, int]]:
    """What `_take_steps` starts and finishes, step by step."""
    found: list[tuple[str, int]] = []

    def start(i: int, step: Step, call: Call, k: Tensor, v: Tensor) -> Call:
        if call == step.calls[0]:
            found.append(("start", i))
        return call

    def finish(i: int, step: Step, results: list[Call]) -> None:
        assert tuple(results) == step.calls
        found.append(("finish", i))

    k = torch.zeros(1)
    attention._take_steps(Delivery(tokens), k, k, start, finish)  # type: ignore[arg-type]
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
    monkeypatch.setattr(attention, "Lanes", SideBySide)
    found = events(tokens)
    for what in ("start", "finish"):
        assert [i for event, i in found if event == what] == list(range(NUM_STEPS))
    assert most_waiting(found) == waiting


def test_the_current_stream_is_no_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a call may run on the stream that the program is on, and hold up what follows."""
    monkeypatch.setattr(lanes, "_streams", lambda device: ("a", "b", "c"))
    for current, others in (("b", ("a", "c")), ("d", ("a", "b", "c"))):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, current=current: current)
        assert Lanes(torch.device("cuda"))._streams == others


def posts(rank: int, world: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What one rank of a world without messages posts in a backward, in order."""
    found: list[str] = []

    def telling(made: Any) -> Any:
        def make(*args: Any) -> Any:
            found.append(made.__name__)
            return made(*args)

        return make

    with world_without_messages(rank, world) as ranks, monkeypatch.context() as patch:
        patch.setattr(p2p, "RingChunks", telling(p2p.RingChunks))
        patch.setattr(p2p, "RingParts", telling(p2p.RingParts))
        plan = attention.Plan(ranks, make_layout("zigzag", world), "p2p", "math", True, 1.0)
        q, k, v, out, dout = torch.randn(5, 1, 8, 1, 4)
        lse = torch.zeros(1, 1, 8)
        attention.attend_backward(dout, q, k, v, out, lse, plan, UNTIMED)
    return found


@pytest.mark.parametrize("large", [64, 128, 255, 256])
def test_all_ranks_send_in_one_order(monkeypatch: pytest.MonkeyPatch, large: int) -> None:
    """Fails if what a rank fetches decides when it sends gradients: NCCL ranks would hang.

    A round of one distance brings 128 bytes or 256.
    """
    single = tuple(range(distance, distance + 1) for distance in range(1, 8))
    monkeypatch.setattr(p2p, "ring_rounds", lambda *_: single)
    monkeypatch.setattr(attention, "Lanes", SideBySide)
    monkeypatch.setattr(lanes, "HELD_BYTES", large)
    orders = {tuple(posts(rank, 8, monkeypatch)) for rank in range(8)}
    assert len(orders) == 1
    (order,) = orders
    assert order.count("RingChunks") == order.count("RingParts") == 7
