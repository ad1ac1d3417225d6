"""Exact attention across ranks: one loop forward, one backward, over any rotation and backend."""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from lhcp.precision import without_autocast
from lhcp.ring.block.base import BackwardInputs, Grads
from lhcp.ring.calls import BlockCalls
from lhcp.ring.documents import PackedRows
from lhcp.ring.kv import KV
from lhcp.ring.merge.deferred import DeferredMerge
from lhcp.ring.plan import RingPlan
from lhcp.ring.rotation import ROTATIONS
from lhcp.ring.rotation.base import CallGrads, Rotation, RotationContext
from lhcp.ring.schedule import Call, Step, own_call
from lhcp.ring.shape import AttentionShape
from lhcp.ring.streams import CallStreams, Started
from lhcp.timing import Spans

R = TypeVar("R")


@without_autocast
def ring_forward(
    q: Tensor, kv: KV, plan: RingPlan, spans: Spans, packed: PackedRows | None = None
) -> tuple[Tensor, Tensor]:
    """Attend to all ranks' keys and values.

    Args:
        q: [B, n, H, D]; kv: [B, n, Hk, D], this rank's tokens.
        packed: the documents inside which alone is attended.

    Returns:
        out [B, n, H, D] in the dtype of q; lse [B, H, n], float32 (float64 for float64).
    """
    plan = plan if packed is None else packed.limit(plan)
    shape, blocks = plan.shape, BlockCalls(plan, packed)
    if plan.ranks.world_size == 1:
        with spans.span("ring_forward", "compute", 0, q.device):
            whole = blocks.forward(q, kv, *own_call(shape, 0))
        return whole[0].contiguous(), whole[1].contiguous()
    rotation = ROTATIONS[plan.rotation](RotationContext(plan.ranks, shape, False, spans), kv)
    views, merge = _Views(shape), DeferredMerge(q, shape.tuning)

    def start(i: int, step: Step, call: Call, kv_i: KV) -> tuple[Tensor, Tensor]:
        with spans.span("ring_forward", "compute", i, q.device):
            keys = views.keys(kv_i, call, step)
            return blocks.forward(views.queries(q, call, step), keys, call, step)

    def finish(i: int, step: Step, results: Sequence[tuple[Tensor, Tensor]]) -> None:
        for call, (out, lse) in zip(step.calls, results, strict=True):
            out, lse = views.unfold(out, call), views.unfold_lse(lse, call)
            merge.add(views.rows(call, step), views.heads(step), out, lse)

    _take_steps(rotation, q.device, shape, start, finish, late=shape.gives_head_start)
    out, lse = merge.result()
    assert lse is not None
    return out, lse


@without_autocast
def ring_backward(
    inputs: BackwardInputs, plan: RingPlan, spans: Spans, packed: PackedRows | None = None
) -> Grads:
    """Compute the gradients of `ring_forward` with respect to q, k and v of this rank's tokens.

    Sums over steps and ranks are wide (float32, float64 for float64) and rounded once.

    Args:
        inputs: of this rank's tokens; out and lse are what `ring_forward` returned.
        packed: what it was given.

    Returns:
        dq, dk, dv in the shapes and dtypes of q, k, v.
    """
    plan = plan if packed is None else packed.limit(plan)
    shape, blocks = plan.shape, BlockCalls(plan, packed)
    dout, q, kv, out, lse = inputs = inputs._replace(dout=inputs.dout.contiguous())
    if plan.ranks.world_size == 1:
        with spans.span("ring_backward", "compute", 0, q.device):
            return blocks.backward(inputs, *own_call(shape, 0))
    rotation = ROTATIONS[plan.rotation](RotationContext(plan.ranks, shape, True, spans), kv)
    views, merge = _Views(shape), DeferredMerge(q, shape.tuning)

    def start(i: int, step: Step, call: Call, kv_i: KV) -> Grads:
        with spans.span("ring_backward", "compute", i, q.device):
            mine = BackwardInputs(
                views.queries(dout, call, step),
                views.queries(q, call, step),
                views.keys(kv_i, call, step),
                views.queries(out, call, step),
                views.lse(lse, call, step),
            )
            return blocks.backward(mine, call, step)

    def finish(i: int, step: Step, results: Sequence[Grads]) -> None:
        grads = []
        for call, (dq, *dkv) in zip(step.calls, results, strict=True):
            merge.add(views.rows(call, step), views.heads(step), views.unfold(dq, call))
            grads.append(CallGrads(call, KV(*(views.unfold(x, call) for x in dkv))))
        rotation.collect(i, grads)

    _take_steps(rotation, q.device, shape, start, finish)
    # The last gradients travel meanwhile.
    dq, _ = merge.result()
    return dq, *rotation.owned_grads()


def _take_steps(
    rotation: Rotation,
    device: torch.device,
    shape: AttentionShape,
    start: Callable[[int, Step, Call, KV], R],
    finish: Callable[[int, Step, Sequence[R]], None],
    *,
    late: bool = False,
) -> None:
    """Start each step's calls on what is delivered; finish steps in order. The one loop.

    On a GPU the calls run side by side, and a step is finished once those of the next one or two
    are under way, so that what finishing waits for does not hold them up.

    Args:
        late: whether the first step's calls let the messages that travel beside them begin first. A
            backward's call has a small kernel before its large one, which does as much.
    """
    streams = CallStreams(device)
    left = shape.steps_left(rotation.step_bytes) if streams.side_by_side else 0
    # What calls read is kept until they are waited for.
    waiting: deque[tuple[int, Step, KV, list[Started[R]]]] = deque()

    def finish_first() -> None:
        i, step, _, calls = waiting.popleft()
        finish(i, step, [call.result() for call in calls])

    for i, (step, kv_i) in enumerate(rotation.deliver()):
        while step.last and waiting:
            finish_first()
        calls = [
            streams.start(partial(start, i, step, call, kv_i), late=late and i == 0)
            for call in step.calls
        ]
        waiting.append((i, step, kv_i, calls))
        while len(waiting) > left:
            finish_first()
    while waiting:
        finish_first()


class _Views:
    """The rows and heads that a call reads and writes, as views of this rank's tensors."""

    def __init__(self, shape: AttentionShape) -> None:
        self._chunk = shape.chunk
        self._groups = shape.num_heads // shape.num_kv_heads

    def rows(self, call: Call, step: Step) -> tuple[int, int]:
        """Return the run of the call's queries."""
        (first, stop), rows = call.q, step.of_chunk(self._chunk)
        assert rows == self._chunk or stop == first + 1, (call, step)
        return first * self._chunk, (stop - 1) * self._chunk + rows

    def heads(self, step: Step) -> tuple[int, int]:
        """Return the run of the step's query heads."""
        return step.heads[0] * self._groups, step.heads[1] * self._groups

    def queries(self, x: Tensor, call: Call, step: Step) -> Tensor:
        """Return the call's queries of [B, n, H, D]."""
        return self._fold(x[:, slice(*self.rows(call, step)), slice(*self.heads(step))], call)

    def keys(self, kv: KV, call: Call, step: Step) -> KV:
        """Return the call's keys of what was delivered."""
        run = kv.tokens(*(edge * step.of_chunk(self._chunk) for edge in call.kv))
        return run.map(lambda x: self._fold(x, call)) if call.per_chunk else run

    def lse(self, lse: Tensor, call: Call, step: Step) -> Tensor:
        """Return the call's queries of [B, H, n]."""
        run = lse[:, slice(*self.heads(step)), slice(*self.rows(call, step))]
        if not call.per_chunk:
            return run.contiguous()
        return run.unflatten(2, (call.q[1] - call.q[0], -1)).transpose(1, 2).flatten(0, 1)

    def _fold(self, x: Tensor, call: Call) -> Tensor:
        """Put the chunks of a per-chunk call into the batch: [B, c n, ...] -> [B c, n, ...]."""
        if not call.per_chunk:
            return x
        return x.unflatten(1, (call.q[1] - call.q[0], -1)).flatten(0, 1)

    def unfold(self, x: Tensor, call: Call) -> Tensor:
        """Undo the fold of a result: [B c, n, ...] -> [B, c n, ...]."""
        if not call.per_chunk:
            return x
        return x.unflatten(0, (-1, call.q[1] - call.q[0])).flatten(1, 2)

    def unfold_lse(self, lse: Tensor, call: Call) -> Tensor:
        """Undo the fold of an lse: [B c, H, n] -> [B, H, c n]."""
        if not call.per_chunk:
            return lse
        return lse.unflatten(0, (-1, call.q[1] - call.q[0])).transpose(1, 2).flatten(2)
