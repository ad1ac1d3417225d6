"""`Graphs`: the attention of a model's layers as CUDA graphs, messages included.

A call of a layer launches dozens of short kernels and messages, which takes the host longer than a
GPU takes to carry them out at the lengths that a rank holds. A graph launches them at once. The
layers have no parameters, so whatever moves weights (FSDP) does not concern their graphs.

A layer's first calls run as they are; then its forward and its backward are recorded, each into a
graph of its own. What a forward keeps for its backward stays where the graph put it, as its output
does; inputs and gradients are copied, from and to memory that all layers use. What is free again
after a recording is used by the recordings after it: so graphs run in the order in which a
training step does, forwards as recorded and backwards the other way round, and whatever would read
what another order has overwritten is an error.
"""

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lhcp.comm.comparison import told
from lhcp.comm.mesh import Ranks
from lhcp.layer.recorder import CudaRecorder, Recorder, Watch

Attend = Callable[..., Tensor]
"""(q, k, v, *others) -> o: what is recorded. `others` get no gradient."""

CALLS_BEFORE = 2
"""Calls that run as they are before a layer is recorded: kernels are compiled in them, ranks agree,
and NCCL connects. An even number, so that no recording falls to a checkpoint's recomputation."""

MOST_SIZES = 4
"""Kinds of calls of one layer and mode that have graphs; further ones run as they are."""

PACE = "whether the host sets the pace of an attention"
"""What ranks tell one another before one of them records."""

_log = logging.getLogger("lhcp")


def _fill(static: Sequence[Tensor], given: Sequence[Tensor]) -> None:
    """Copy what is given to where a graph reads it."""
    for into, x in zip(static, given, strict=True):
        into.detach().copy_(x)


def _same(x: Tensor) -> Tensor:
    return x


def _call(function: Callable[..., Tensor], *args: object) -> Tensor:
    """Call a function; what torch.compile is told not to trace."""
    return function(*args)


@dataclass(frozen=True)
class Kind:
    """What a layer does in a call."""

    mode: str
    """Of which a layer has graphs of one at a time."""
    ranks: Ranks
    more: Hashable


@dataclass(eq=False)
class _Recording:
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


class Graphs:
    """The graphs of some layers, in one pool of memory.

    Args:
        shared: one pair of graphs for all layers whose calls are alike: for layers inside
            activation checkpointing, whose forward runs again just before its backward. Memory is
            then that of one layer.
        always: record also what takes the GPU longer than the host: then there is nothing to gain,
            and copying inputs and gradients costs some percent of the call.
        recorder: what records; None: into CUDA graphs.
    """

    def __init__(
        self, shared: bool = False, always: bool = False, recorder: Recorder | None = None
    ) -> None:
        self.shared, self.always = shared, always
        self.recorder: Recorder = CudaRecorder() if recorder is None else recorder
        self.eager: Counter[str] = Counter()
        """Calls that ran without a graph, by reason."""
        self._records: dict[tuple[object, Hashable], _Recording] = {}
        self._calls: Counter[Hashable] = Counter()
        self._watches: dict[Hashable, list[Watch]] = {}
        """Of the last of each layer's first calls, by kind."""
        self._paced: dict[Hashable, bool] = {}
        """Whether it is the host that such calls wait for, once that is known."""
        self._buffers: dict[Hashable, Tensor] = {}
        """What all layers' graphs read inputs from and write gradients to, by use and size."""
        self._made = 0
        # torch.compile breaks its own graph here. Not as a decorator, which imports the compiler.
        self.outside: Callable[..., Tensor] = torch.compiler.disable(_call)

    def __deepcopy__(self, memo: object) -> "Graphs":
        """Return these graphs: a copy of a layer records its own among them."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as graphs of which none is recorded yet."""
        return type(self), (self.shared, self.always)

    def call(self, attend: Attend, tensors: list[Tensor], layer: object, kind: Kind) -> Tensor:
        """Attend by a graph if there is one or can be, else as it is.

        Args:
            tensors: q, k, v and what else `attend` reads.
            layer: whose call it is.
            kind: what `attend` does with tensors of such sizes and needs of gradients.
        """
        reason = self.recorder.refuses(tensors[0].device)
        if reason is None and not (
            torch.is_grad_enabled() and any(x.requires_grad for x in tensors[:3])
        ):
            reason = "no gradient is wanted"
        if reason is not None:
            return self.as_it_is(reason, attend, tensors)
        key = (kind, tuple((x.shape, x.dtype, x.requires_grad) for x in tensors))
        own = (None if self.shared else layer, key)
        record = self._records.get(own)
        if record is None:
            self._calls[layer, key] += 1
            if self._calls[layer, key] <= CALLS_BEFORE:
                watched = partial(self.as_it_is, "first calls", attend, tensors)
                out, watch = self.recorder.watch(watched)
                if self._calls[layer, key] == CALLS_BEFORE and key not in self._paced:
                    self._watches.setdefault(key, []).append(watch)
                return out
            reason = None if self._host_paces(kind, key) else "the GPU takes longer than the host"
            if (reason := reason or self._full(own[0], kind.mode)) is not None:
                return self.as_it_is(reason, attend, tensors)
            record = self._records[own] = self._record(attend, tensors, kind.mode)
        replayed: Tensor = _Replay.apply(self, record, *tensors)
        return replayed

    def _host_paces(self, kind: Kind, key: Hashable) -> bool:
        """Return whether the host of some rank takes longer to launch such calls than its GPU.

        The same on all ranks, since one that launches call by call would hold up the others. Where
        ranks are apart, the GPU of the early one waits for messages, which looks like work: so it
        is the quicker quarter of the layers that counts, and any rank's word.
        """
        if self.always:
            return True
        if key not in self._paced:
            ratios = sorted(watch.ratio for watch in self._watches.pop(key, []))
            # None where a checkpoint around the layer alone ends its second call midway.
            mine = not ratios or ratios[(len(ratios) - 1) // 4] < 1.15
            self._paced[key] = "yes" in told(kind.ranks, PACE, "yes" if mine else "no")
        return self._paced[key]

    def _full(self, layer: object, mode: str) -> str | None:
        """Drop a layer's graphs of other modes; return why it may have none more in this."""
        of_layer = [key for key in self._records if key[0] is layer]
        for key in of_layer:
            # Shared graphs serve layers of both modes at once.
            if layer is not None and self._records[key].mode != mode:
                del self._records[key]
        if sum(self._records[k].mode == mode for k in of_layer if k in self._records) < MOST_SIZES:
            return None
        return f"more than {MOST_SIZES} kinds of calls of one layer"

    def as_it_is(self, reason: str, attend: Attend, tensors: list[Tensor]) -> Tensor:
        """Attend without a graph, and say why where that is new."""
        if reason not in self.eager:
            _log.info("attention without a graph: %s", reason)
        self.eager[reason] += 1
        return attend(*tensors)

    def release(self) -> None:
        """Drop all graphs and their memory; later calls record anew.

        Before a process group is destroyed: NCCL waits for graphs that hold its messages.
        """
        self._records.clear()
        self._calls.clear()
        self._buffers.clear()
        self._watches.clear()
        self._paced.clear()

    def _buffer(self, use: str, like: Tensor) -> Tensor:
        """Return memory that the graphs of all layers use for this, one after another."""
        key = (use, like.shape, like.stride(), like.dtype, like.requires_grad)
        if key not in self._buffers:
            self._buffers[key] = torch.empty_like(like).requires_grad_(like.requires_grad)
        return self._buffers[key]

    def _record(self, attend: Attend, tensors: list[Tensor], mode: str) -> _Recording:
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
        self._made += 1
        return _Recording(self._made, mode, inputs, out, dout, borrowed, again, back, kept)

    def begin(self, record: _Recording) -> int:
        """Note that a forward runs; return which of its runs it is."""
        self._overwrite(record)
        record.runs += 1
        return record.runs

    def end(self, record: _Recording, run: int) -> None:
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

    def _overwrite(self, record: _Recording) -> None:
        """Note that a graph runs: what was recorded after it may have used its memory since."""
        for other in self._records.values():
            if other.number > record.number:
                other.runs += 1


class _Replay(torch.autograd.Function):
    """A record's forward and backward."""

    @staticmethod
    def forward(ctx: Any, graphs: Graphs, record: _Recording, *tensors: Tensor) -> Tensor:
        _fill(record.inputs, tensors)
        ctx.graphs, ctx.record = graphs, record
        run = graphs.begin(record)
        record.forward()
        # As a tensor: a checkpoint runs the forward again for what was saved, and hands the
        # backward what that saved.
        ctx.save_for_backward(torch.tensor((run, record.out._version)))
        return record.out.detach()

    @staticmethod
    def backward(ctx: Any, *dout: Tensor) -> Any:
        graphs, record = ctx.graphs, ctx.record
        if torch.is_grad_enabled():
            raise RuntimeError(
                "lhcp does not differentiate twice, and a CUDA graph's gradients have no graph: "
                "leave create_graph out"
            )
        run, version = ctx.saved_tensors[0].tolist()
        graphs.end(record, run)
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
