"""Exact attention across ranks: one loop forward, one backward, over any rotation and backend."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from torch import Tensor

from lhcp.comm.layout import Layout
from lhcp.comm.mesh import Ranks
from lhcp.ring.block import BLOCKS
from lhcp.ring.merge.deferred import Partials
from lhcp.ring.rotation import ROTATIONS
from lhcp.ring.rotation.base import Grads, Rotation, Trip
from lhcp.ring.schedule import Call, Step
from lhcp.ring.streams import Lanes, Started
from lhcp.timing import Spans

R = TypeVar("R")


@dataclass(frozen=True)
class Plan:
    """How one attention is carried out; every choice made, nothing "auto"."""

    ranks: Ranks
    layout: Layout
    rotation: str
    backend: str
    causal: bool
    scale: float


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, spans: Spans) -> tuple[Tensor, Tensor]:
    """Attend to all ranks' keys and values.

    Args:
        q: [B, n, H, D]; k, v: [B, n, Hk, D], this rank's tokens.

    Returns:
        out [B, n, H, D] in the dtype of q; lse [B, H, n], float32 (float64 for float64).
    """
    block = BLOCKS[plan.backend]
    if plan.ranks.world_size == 1:
        with spans.span("ring_forward", "compute", 0, q.device):
            whole = block.forward(q, k, v, plan.causal, plan.scale)
        return whole[0].contiguous(), whole[1].contiguous()
    trip = Trip(plan.ranks, plan.layout, plan.causal, q.shape[2], False, spans)
    views = _Views(plan.layout, q, k)
    rotation = ROTATIONS[plan.rotation](trip, k)
    partials = Partials(q)

    def start(i: int, step: Step, call: Call, k_i: Tensor, v_i: Tensor) -> tuple[Tensor, Tensor]:
        with spans.span("ring_forward", "compute", i, q.device):
            return block.forward(
                views.queries(q, call, step),
                views.keys(k_i, call),
                views.keys(v_i, call),
                call.causal,
                plan.scale,
            )

    def finish(i: int, step: Step, results: Sequence[tuple[Tensor, Tensor]]) -> None:
        for call, (out, lse) in zip(step.calls, results, strict=True):
            out, lse = views.unfold(out, call), views.unfold_lse(lse, call)
            partials.add(views.rows(call), views.heads(step), out, lse)

    _take_steps(rotation, k, v, start, finish)
    out, lse = partials.result()
    assert lse is not None
    return out, lse


def _take_steps(
    rotation: Rotation,
    k: Tensor,
    v: Tensor,
    start: Callable[[int, Step, Call, Tensor, Tensor], R],
    finish: Callable[[int, Step, Sequence[R]], None],
) -> None:
    """The one loop: start each step's calls on what is delivered; finish steps in order.

    On a GPU the calls run side by side, and a step is finished once those of the next one or two
    are under way, so that what finishing waits for does not hold them up.
    """
    lanes = Lanes(k.device)
    left = lanes.steps_left(rotation.step_bytes)
    # What calls read is kept until they are waited for.
    waiting: deque[tuple[int, Step, Tensor, Tensor, list[Started[R]]]] = deque()

    def finish_first() -> None:
        i, step, _, _, calls = waiting.popleft()
        finish(i, step, [call.result() for call in calls])

    for i, (step, k_i, v_i) in enumerate(rotation.deliver(k, v)):
        calls = [lanes.start(partial(start, i, step, call, k_i, v_i)) for call in step.calls]
        waiting.append((i, step, k_i, v_i, calls))
        while len(waiting) > left:
            finish_first()
    while waiting:
        finish_first()


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Plan,
    spans: Spans,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend` with respect to q, k and v of this rank's tokens.

    Sums over steps and ranks are wide (float32, float64 for float64) and rounded once.

    Args:
        dout: [B, n, H, D]. out, lse: what `attend` returned.

    Returns:
        dq, dk, dv in the shapes and dtypes of q, k, v.
    """
    block = BLOCKS[plan.backend]
    dout = dout.contiguous()
    if plan.ranks.world_size == 1:
        with spans.span("ring_backward", "compute", 0, q.device):
            return block.backward(dout, q, k, v, out, lse, plan.causal, plan.scale)
    trip = Trip(plan.ranks, plan.layout, plan.causal, q.shape[2], True, spans)
    rotation = ROTATIONS[plan.rotation](trip, k)
    views = _Views(plan.layout, q, k)
    partials = Partials(q)

    def start(i: int, step: Step, call: Call, k_i: Tensor, v_i: Tensor) -> tuple[Tensor, ...]:
        with spans.span("ring_backward", "compute", i, q.device):
            return block.backward(
                views.queries(dout, call, step),
                views.queries(q, call, step),
                views.keys(k_i, call),
                views.keys(v_i, call),
                views.queries(out, call, step),
                views.lse(lse, call, step),
                call.causal,
                plan.scale,
            )

    def finish(i: int, step: Step, results: Sequence[tuple[Tensor, ...]]) -> None:
        grads = []
        for call, (dq, dk, dv) in zip(step.calls, results, strict=True):
            partials.add(views.rows(call), views.heads(step), views.unfold(dq, call))
            grads.append(Grads(call, views.unfold(dk, call), views.unfold(dv, call)))
        rotation.collect(i, grads)

    _take_steps(rotation, k, v, start, finish)
    # The last gradients travel meanwhile.
    dq, _ = partials.result()
    dk, dv = rotation.home()
    return dq, dk, dv


class _Views:
    """The rows and heads that a call reads and writes, as views of this rank's tensors."""

    def __init__(self, layout: Layout, q: Tensor, k: Tensor) -> None:
        self._chunk = q.shape[1] // layout.chunks_per_rank
        self._groups = q.shape[2] // k.shape[2]

    def rows(self, call: Call) -> tuple[int, int]:
        """The call's queries."""
        return call.q[0] * self._chunk, call.q[1] * self._chunk

    def heads(self, step: Step) -> tuple[int, int]:
        """The step's query heads."""
        return step.heads[0] * self._groups, step.heads[1] * self._groups

    def queries(self, x: Tensor, call: Call, step: Step) -> Tensor:
        return self._fold(x[:, slice(*self.rows(call)), slice(*self.heads(step))], call)

    def keys(self, x: Tensor, call: Call) -> Tensor:
        return self._fold(x[:, call.kv[0] * self._chunk : call.kv[1] * self._chunk], call)

    def lse(self, lse: Tensor, call: Call, step: Step) -> Tensor:
        part = lse[:, slice(*self.heads(step)), slice(*self.rows(call))]
        if not call.per_chunk:
            return part.contiguous()
        return part.unflatten(2, (call.q[1] - call.q[0], -1)).transpose(1, 2).flatten(0, 1)

    def _fold(self, x: Tensor, call: Call) -> Tensor:
        """Put the chunks of a per-chunk call into the batch: [B, c n, ...] -> [B c, n, ...]."""
        if not call.per_chunk:
            return x
        return x.unflatten(1, (call.q[1] - call.q[0], -1)).flatten(0, 1)

    def unfold(self, x: Tensor, call: Call) -> Tensor:
        if not call.per_chunk:
            return x
        return x.unflatten(0, (-1, call.q[1] - call.q[0])).flatten(1, 2)

    def unfold_lse(self, lse: Tensor, call: Call) -> Tensor:
        if not call.per_chunk:
            return lse
        return lse.unflatten(0, (-1, call.q[1] - call.q[0])).transpose(1, 2).flatten(2)
