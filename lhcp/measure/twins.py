"""Twins of a rotation, for measuring it: its code without messages, its messages without attention.

The compute-only twin is the very same code on groups that send nothing (`silent`): packing, adds
and merges are all there, and a rotation written tomorrow has its twin already. What others would
have sent is random numbers that were there before (`RandomReceiveBuffers`): whatever memory happens
to hold may take a CPU longer, and zeros draw less power. The communication-only twin
(`Communication`) drives the same rotation object step by step, with gradients that nobody computed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lhcp.comm.mesh import Ranks
from lhcp.comm.torch_private import new_fake_group
from lhcp.ring.heads import SHARE_HEADS
from lhcp.ring.kv import KV
from lhcp.ring.plan import RingPlan
from lhcp.ring.rotation import ROTATIONS
from lhcp.ring.rotation.alltoall import HeadsToTokens, TokensToHeads
from lhcp.ring.rotation.base import CallGrads, Rotation, RotationContext
from lhcp.timing import Spans


class RandomReceiveBuffers:
    """Memory for messages that never come: random numbers, drawn once.

    Up to eight buffers of each size take turns: what is read together is not the same memory.
    """

    def __init__(self) -> None:
        self._drawn: dict[tuple[Any, ...], list[Tensor]] = {}
        self._turns: dict[tuple[Any, ...], int] = {}

    def restart(self) -> None:
        """Let the next run have the buffers of the last one, in the same order."""
        self._turns = {}

    def __call__(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the buffer whose turn it is."""
        key = (shape, like.dtype, like.device)
        buffers, turn = self._drawn.setdefault(key, []), self._turns.get(key, 0)
        self._turns[key] = turn + 1
        if len(buffers) <= turn % 8:
            if like.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("a graph would draw again at every replay; run once before")
            buffers.append(torch.randn(shape, dtype=like.dtype, device=like.device))
        return buffers[turn % 8]


@contextmanager
def silent(ranks: Ranks, buffers: RandomReceiveBuffers) -> Iterator[Ranks]:
    """Yield ranks whose groups complete every message at once and send nothing.

    Every rank of the group must enter and leave, and no other needs to.

    Args:
        buffers: what "arrives" is there.
    """
    made: list[dist.ProcessGroup] = []

    def quiet(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
        if group is None:
            return None
        made.append(new_fake_group(dist.get_process_group_ranks(group)))
        return made[-1]

    try:
        yield Ranks(quiet(ranks.flat), quiet(ranks.outer), quiet(ranks.inner), buffers)
    finally:
        for group in made:
            dist.destroy_process_group(group)


class Communication:
    """Exactly the messages of one attention's forward and backward, and no attention.

    What a rotation does to its messages is part of it: packing and the adding up of gradients.

    Args:
        q: [B, n, H, D]; k, v: [B, n, Hk, D], this rank's tokens.
        plan: of the attention; its backend is not used.
    """

    def __init__(self, qkv: tuple[Tensor, Tensor, Tensor], plan: RingPlan, spans: Spans) -> None:
        self._qkv = tuple(x.detach().requires_grad_() for x in qkv)
        self._kv = KV(qkv[1].detach(), qkv[2].detach())
        self._plan, self._spans = plan, spans
        self._alone = plan.ranks.world_size == 1
        self._gradient = cache(self._make_gradient)
        self._heads: tuple[Tensor, ...] = ()
        self._out: Tensor | None = None
        self._left: Communication | None = None
        """What is left of the attention once heads are exchanged."""

    def forward(self) -> None:
        """Send what the forward sends."""
        if self._alone:
            return
        if self._plan.rotation in SHARE_HEADS:
            self._exchange_heads()
            return
        for _ in self._rotation(backward=False).deliver():
            pass

    def backward(self) -> None:
        """Send what the backward sends; after `forward`."""
        if self._alone:
            return
        if self._plan.rotation in SHARE_HEADS:
            self._exchange_gradients()
            return
        rotation = self._rotation(backward=True)
        chunk = self._plan.shape.chunk
        for i, (step, _) in enumerate(rotation.deliver()):
            heads = step.heads[1] - step.heads[0]
            runs = [(call, call.num_keys * step.of_chunk(chunk)) for call in step.calls]
            rotation.collect(i, [CallGrads(call, self._gradient(run, heads)) for call, run in runs])
        rotation.owned_grads()

    def _rotation(self, backward: bool) -> Rotation:
        plan = self._plan
        context = RotationContext(plan.ranks, plan.shape, backward, self._spans)
        return ROTATIONS[plan.rotation](context, self._kv)

    def _make_gradient(self, tokens: int, heads: int) -> KV:
        """Draw dk and dv of a block, made once a shape: zeros would draw less power."""
        k = self._kv.k
        shape = (2, k.shape[0], tokens, heads, k.shape[3])
        return KV(*torch.randn(shape, dtype=k.dtype, device=k.device))

    def _exchange_heads(self) -> None:
        """Send heads out and back, and between the two what is left of the attention."""
        device, spans, plan = self._kv.k.device, self._spans, self._plan
        shares = plan.sharing_ranks > 1
        q, k, v = self._qkv
        if shares:
            with spans.span("alltoall", "wait", 0, device):
                q, k, v = TokensToHeads.apply(q, k, v, plan, spans)
        self._heads = (q, k, v)
        self._left = Communication((q, k, v), plan.after_exchange(), spans)
        self._left.forward()
        if not shares:
            return
        with spans.span("alltoall", "wait", 1, device):
            self._out = HeadsToTokens.apply(q, plan, spans)

    def _exchange_gradients(self) -> None:
        """Send the output's gradient out, what the rest sends, and those of q, k and v back."""
        assert self._left is not None
        if self._out is not None:
            out = self._qkv[0].detach()
            torch.autograd.grad(self._out, self._heads[0], out, retain_graph=True)
        self._left.backward()
        if self._out is not None:
            grads = [x.detach() for x in self._heads]
            torch.autograd.grad(self._heads, self._qkv, grads, retain_graph=True)
