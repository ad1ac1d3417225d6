"""`Recordings`: the forwards and backwards of layers, recorded and run again in one memory.

What a forward keeps for its backward stays where the graph put it, as its output does; inputs and
gradients are copied, from and to memory that all layers use. What is free again after a recording
is used by the recordings after it: so graphs run in the order in which a training step does,
forwards as recorded and backwards the other way round, and whatever would read what another order
has overwritten is an error.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lhcp.layer.recorder import Recorder

Attend = Callable[..., Tensor]
"""(q, k, v, *others) -> o: what is recorded. `others` get no gradient."""


def _fill(static: Sequence[Tensor], given: Sequence[Tensor]) -> None:
    """Copy what is given to where a graph reads it."""
    for into, x in zip(static, given, strict=True):
        into.detach().copy_(x)


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(eq=False)
class Recording:
    """One layer's graphs: what they read and write stays in place."""

    number: int
    """How many were recorded before."""
    mode: str
    inputs: list[Tensor]
    out: Tensor
    dout: Tensor
    grads: tuple[Tensor, ...]
    """Of those inputs that require one, in order; until another graph runs."""
    forward: Callable[[], None]
    backward: Callable[[], None]
    kept: list[Tensor]
    """Holds the output whose autograd graph holds what the forward keeps."""
    runs: int = 0
    """Forwards so far. A backward belongs to one of them."""


class Recordings:
    """The recordings of some layers, in one pool of memory."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.made: dict[tuple[object, Hashable], Recording] = {}
        """By layer and kind of call; whoever asks for them keeps them here, and drops them."""
        self._buffers: dict[Hashable, Tensor] = {}
        """What all layers' graphs read inputs from and write gradients to, by use and size."""
        self._count = 0

    def clear(self) -> None:
        """Drop all recordings and their memory."""
        self.made.clear()
        self._buffers.clear()

    def _buffer(self, use: str, like: Tensor) -> Tensor:
        """Return memory that the graphs of all layers use for this, one after another."""
        key = (use, like.shape, like.stride(), like.dtype, like.requires_grad)
        if key not in self._buffers:
            self._buffers[key] = torch.empty_like(like).requires_grad_(like.requires_grad)
        return self._buffers[key]

    def record(self, attend: Attend, tensors: list[Tensor], mode: str) -> Recording:
        """Record a layer's forward and backward, to be kept in `made`."""
        inputs = [self._buffer(f"input {i}", x) for i, x in enumerate(tensors)]
        _fill(inputs, tensors)
        kept: list[Tensor] = []
        saved: set[int] = set()

        def note(x: Tensor) -> Tensor:
            saved.add(x.untyped_storage().data_ptr())
            # Not itself: an output that its own node keeps would keep the node.
            return x.detach()

        def forward() -> tuple[Tensor, ...]:
            # Whoever packs what is saved around the layer, such as a checkpoint, packs no graph's.
            with torch.autograd.graph.saved_tensors_hooks(note, _same):
                kept[:] = [attend(*inputs)]
            return (kept[0].detach(),)

        (out,), again = self.recorder.record(forward)
        read_again = [x.untyped_storage().data_ptr() in saved for x in inputs]
        if any(read_again):
            # By the backward, so they have to stay until then: this layer has its own.
            for i, x in enumerate(tensors):
                if read_again[i]:
                    inputs[i] = x.detach().clone().requires_grad_(x.requires_grad)
            (out,), again = self.recorder.record(forward)
        wanted = [x for x in inputs[:3] if x.requires_grad]
        dout = self._buffer("dout", out)

        def backward() -> tuple[Tensor, ...]:
            # Kept, so that what the forward saved is not given to graphs recorded later.
            return torch.autograd.grad(kept[0], wanted, dout, retain_graph=True)

        grads, back = self.recorder.record(backward)
        borrowed = tuple(self.recorder.borrow(x) for x in grads)
        self._count += 1
        return Recording(self._count, mode, inputs, out, dout, borrowed, again, back, kept)

    def begin(self, record: Recording) -> int:
        """Note that a forward runs; return which of its runs it is."""
        self._overwrite(record)
        record.runs += 1
        return record.runs

    def end(self, record: Recording, run: int) -> None:
        """Note that the backward of a forward runs.

        Raises:
            RuntimeError: what that forward kept is overwritten.
        """
        if record.runs != run:
            raise RuntimeError(
                "what this attention kept for its backward is overwritten: with CUDA graphs a "
                "layer's forward runs once before its backward, and backwards run in the reverse "
                "order of forwards. Run each micro-batch's backward before the next forward, use "
                "shared=True only around activation checkpointing, or take the graphs off"
            )
        self._overwrite(record)

    def _overwrite(self, record: Recording) -> None:
        """Note that a graph runs: what was recorded after it may have used its memory since."""
        for other in self.made.values():
            if other.number > record.number:
                other.runs += 1

    def replay(self, record: Recording, tensors: Sequence[Tensor]) -> Tensor:
        """Run a recording's forward on these inputs; its backward runs in autograd's."""
        replayed: Tensor = _Replay.apply(self, record, *tensors)
        return replayed


class _Replay(torch.autograd.Function):
    """A record's forward and backward."""

    @staticmethod
    def forward(ctx: Any, recordings: Recordings, record: Recording, *tensors: Tensor) -> Tensor:
        _fill(record.inputs, tensors)
        ctx.recordings, ctx.record = recordings, record
        run = recordings.begin(record)
        record.forward()
        # As a tensor: a checkpoint runs the forward again for what was saved, and hands the
        # backward what that saved.
        ctx.save_for_backward(torch.tensor((run, record.out._version), device="cpu"))
        return record.out.detach()

    @staticmethod
    def backward(ctx: Any, *dout: Tensor) -> Any:
        recordings, record = ctx.recordings, ctx.record
        if torch.is_grad_enabled():
            raise RuntimeError(
                "lhcp does not differentiate twice, and a CUDA graph's gradients have no graph: "
                "leave create_graph out"
            )
        run, version = ctx.saved_tensors[0].tolist()
        recordings.end(record, run)
        if record.out._version != version:
            raise RuntimeError(
                "the output of an attention was changed in place, and its backward needs it: "
                "change a copy, or take the graphs off"
            )
        record.dout.copy_(dout[0])
        record.backward()
        # Copies: a sum of gradients may wait until another layer's graph has run in their memory.
        grads = iter([x.clone() for x in record.grads])
        return None, None, *(next(grads) if x.requires_grad else None for x in record.inputs)
