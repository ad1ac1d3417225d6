"""Twins of a rotation, for measuring it: its code without messages, its messages without attention.

The compute-only twin is the very same code on groups that send nothing (`silent`): packing, adds
and merges are all there, and a rotation written tomorrow has its twin already. What others would
have sent is random numbers that were there before (`Filled`): whatever memory happens to hold may
take a CPU longer, and zeros draw less power. The communication-only twin (`Communication`) drives
the same rotation object step by step, with gradients that nobody computed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lhcp.comm.mesh import Ranks
from lhcp.ring.rotation import ROTATIONS, messages
from lhcp.ring.rotation.alltoall import HeadsToTokens, TokensToHeads
from lhcp.ring.rotation.base import Grads, Trip, wide


@contextmanager
def silent(ranks: Ranks) -> Iterator[Ranks]:
    """Yield ranks whose groups complete every message at once and send nothing.

    Every rank of the group must enter and leave, and no other needs to.
    """
    # Registers torch's "fake" backend: ranks and sizes of a group, and nothing behind them.
    import torch.testing._internal.distributed.fake_pg  # noqa: F401

    made: list[dist.ProcessGroup] = []

    def quiet(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
        if group is None:
            return None
        members = dist.get_process_group_ranks(group)
        made.append(dist.new_group(members, backend="fake", use_local_synchronization=True))
        return made[-1]

    try:
        yield Ranks(quiet(ranks.flat), quiet(ranks.outer), quiet(ranks.inner))
    finally:
        for group in made:
            dist.destroy_process_group(group)


class Filled:
    """While entered, all memory that messages would fill holds random numbers, drawn once.

    Up to eight buffers of each size take turns: what is read together is not the same memory. Enter
    it where no message is sent: what a message wrote would stay in the way of the next.
    """

    def __init__(self) -> None:
        self._drawn: dict[tuple[Any, ...], list[Tensor]] = {}
        self._turns: dict[tuple[Any, ...], int] = {}

    def __enter__(self) -> None:
        self._turns = {}
        # For all threads: backwards run in threads of their own.
        self._original = messages.arriving
        messages.arriving = self._random

    def __exit__(self, *error: object) -> None:
        messages.arriving = self._original

    def _random(self, like: Tensor, *shape: int) -> Tensor:
        key = (shape, like.dtype, like.device)
        buffers, turn = self._drawn.setdefault(key, []), self._turns.get(key, 0)
        self._turns[key] = turn + 1
        if len(buffers) <= turn % 8:
            if like.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("a graph would draw again at every replay; run once before")
            buffers.append(torch.randn(shape, dtype=like.dtype, device=like.device))
        return buffers[turn % 8]


class Communication:
    """Exactly the messages of one attention's forward and backward, and no attention.

    What a rotation does to its messages is part of it: packing and the adding up of gradients.

    Args:
        q: [B, n, H, D]; k, v: [B, n, Hk, D], this rank's tokens.
        rotation: its name.
        forward, backward: what the rotation is made from in each direction.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, rotation: str, forward: Trip, backward: Trip
    ) -> None:
        self._qkv = tuple(x.detach().requires_grad_() for x in (q, k, v))
        self._k, self._v = k.detach(), v.detach()
        self._rotation, self._forward, self._backward = rotation, forward, backward
        self._alone = forward.ranks.world_size == 1
        self._gradient = cache(self._make_gradient)
        self._out: Tensor | None = None

    def forward(self) -> None:
        """Send what the forward sends."""
        if self._alone:
            return
        if self._rotation == "alltoall":
            self._out = self._exchange_heads(self._forward)
            return
        for _ in ROTATIONS[self._rotation](self._forward, self._k).deliver(self._k, self._v):
            pass

    def backward(self) -> None:
        """Send what the backward sends; after `forward`."""
        if self._alone:
            return
        if self._rotation == "alltoall":
            assert self._out is not None
            torch.autograd.grad(self._out, self._qkv, self._qkv[0].detach(), retain_graph=True)
            return
        trip, k = self._backward, self._k
        rotation = ROTATIONS[self._rotation](trip, k)
        chunk = k.shape[1] // trip.layout.chunks_per_rank
        for i, (step, _, _) in enumerate(rotation.deliver(k, self._v)):
            heads = step.heads[1] - step.heads[0]
            runs = [(call, (call.kv[1] - call.kv[0]) * chunk) for call in step.calls]
            rotation.collect(i, [Grads(call, *self._gradient(run, heads)) for call, run in runs])
        rotation.home()

    def _make_gradient(self, tokens: int, heads: int) -> tuple[Tensor, Tensor]:
        """Random dk and dv of a block, made once a shape: zeros would draw less power."""
        k = self._k
        shape = (2, k.shape[0], tokens, heads, k.shape[3])
        dk, dv = torch.randn(shape, dtype=k.dtype, device=k.device)
        return dk, dv

    def _exchange_heads(self, trip: Trip) -> Tensor:
        """Heads out and home: a graph whose backward sends the gradients' two messages."""
        device, exchange = self._k.device, (trip.ranks, trip.layout)
        with trip.spans.span("alltoall", "wait", 0, device):
            q, _, _ = TokensToHeads.apply(*self._qkv, *exchange)
        with trip.spans.span("alltoall", "wait", 1, device), torch.no_grad():
            HeadsToTokens.apply(q[..., :1].to(wide(q.dtype)), *exchange)
        with trip.spans.span("alltoall", "wait", 2, device):
            out = HeadsToTokens.apply(q, *exchange)
        assert isinstance(out, Tensor)
        return out
