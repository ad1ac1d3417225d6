"""`Graphs`: the attention of a model's layers as CUDA graphs, messages included.

A call of a layer launches dozens of short kernels and messages, which takes the host longer than a
GPU takes to carry them out at the lengths that a rank holds. A graph launches them at once. The
layers have no parameters, so whatever moves weights (FSDP) does not concern their graphs.

A layer's first calls run as they are; then its forward and its backward are recorded, each into a
graph of its own (`lhcp.layer.recording`).
"""

import logging
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lhcp.comm.comparison import told
from lhcp.comm.mesh import Ranks
from lhcp.layer.recorder import CudaRecorder, Recorder, Watch
from lhcp.layer.recording import Attend, Recordings

CALLS_BEFORE = 2
"""Calls that run as they are before a layer is recorded: kernels are compiled in them, ranks agree,
and NCCL connects. An even number, so that no recording falls to a checkpoint's recomputation."""

MOST_SIZES = 4
"""Kinds of calls of one layer and mode that have graphs; further ones run as they are."""

PACE = "whether the host sets the pace of an attention"
"""What ranks tell one another before one of them records."""

_log = logging.getLogger("lhcp")


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
        self.recordings = Recordings(self.recorder)
        self.eager: Counter[str] = Counter()
        """Calls that ran without a graph, by reason."""
        self._calls: Counter[Hashable] = Counter()
        self._watches: dict[Hashable, list[Watch]] = {}
        """Of the last of each layer's first calls, by kind."""
        self._paced: dict[Hashable, bool] = {}
        """Whether it is the host that such calls wait for, once that is known."""
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
        record = self.recordings.made.get(own)
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
            record = self.recordings.record(attend, tensors, kind.mode)
            self.recordings.made[own] = record
        return self.recordings.replay(record, tensors)

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
        made = self.recordings.made
        of_layer = [key for key in made if key[0] is layer]
        for key in of_layer:
            # Shared graphs serve layers of both modes at once.
            if layer is not None and made[key].mode != mode:
                del made[key]
        if sum(made[k].mode == mode for k in of_layer if k in made) < MOST_SIZES:
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
        self.recordings.clear()
        self._calls.clear()
        self._watches.clear()
        self._paced.clear()
