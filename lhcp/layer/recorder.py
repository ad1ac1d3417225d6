"""Recording what a function does to tensors: `Recorder`, and the one that makes CUDA graphs."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor


class Recorder(Protocol):
    """Records what a function does to the tensors it reads, so that it can be done again."""

    def refuses(self, device: torch.device) -> str | None:
        """Return why nothing can be recorded now; None if it can."""

    def record(
        self, function: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        """Call the function; return its results and what computes them again, into them."""

    def borrow(self, x: Tensor) -> Tensor:
        """Return a result's memory without keeping it from being used by later recordings."""

    def watch(self, function: Callable[[], Tensor]) -> tuple[Tensor, "Watch"]:
        """Call the function; return its result, and what tells how long it took."""


@dataclass(frozen=True)
class Watch:
    """How long a call took its host and its device, in ms."""

    host: float
    device: Callable[[], float]
    """Waits until the call is over there."""

    @property
    def ratio(self) -> float:
        """Device over host: 1 where the device waited for launches, and was done with the host."""
        return self.device() / self.host


class CudaRecorder:
    """Records into CUDA graphs that share their memory."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._runs_on: torch.cuda.Stream | None = None
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def refuses(self, device: torch.device) -> str | None:
        """Return why nothing can be recorded now; None if it can."""
        if device.type != "cuda":
            return f"inputs are on {device.type}: graphs need a GPU"
        if torch.cuda.is_current_stream_capturing():
            return "another graph is being recorded around the layer"
        current = torch.cuda.current_stream(device)
        if self._runs_on is None:
            self._runs_on = current
        if current != self._runs_on:
            return "another stream than that of the first call, whose memory graphs share"
        return None

    def record(
        self, function: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        """Capture a call of the function. Its kernels run at each replay, the first time too."""
        if not self._graphs:
            # A pool ends with its last graph.
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        graph, stream, current = torch.cuda.CUDAGraph(), self._stream, torch.cuda.current_stream()
        assert stream is not None
        stream.wait_stream(current)
        with _no_collection(), torch.cuda.stream(stream):
            # Other threads, such as NCCL's watchdog, ask for events meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                results = function()
            finally:
                graph.capture_end()
        current.wait_stream(stream)
        self._graphs.add(graph)
        return results, graph.replay

    def watch(self, function: Callable[[], Tensor]) -> tuple[Tensor, Watch]:
        """Call the function, on the host's clock and on the GPU's."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        begin = time.perf_counter()
        result = function()
        host = 1e3 * (time.perf_counter() - begin)
        stop.record()

        def device() -> float:
            stop.synchronize()
            return start.elapsed_time(stop)

        return result, Watch(host, device)

    def borrow(self, x: Tensor) -> Tensor:
        """Return a result's memory without keeping it from being used by later recordings."""
        storage = x.untyped_storage()
        memory = torch.as_tensor(_Memory(storage.data_ptr(), storage.nbytes()), device=x.device)
        return memory.view(x.dtype).as_strided(x.shape, x.stride(), x.storage_offset())


@dataclass(frozen=True)
class _Memory:
    """Bytes on a GPU that somebody else owns."""

    pointer: int
    size: int

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Describe them (numba.readthedocs.io, CUDA Array Interface, version 3)."""
        data = (self.pointer, False)
        return {"shape": (self.size,), "typestr": "|u1", "data": data, "version": 3}


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python from ending other graphs or events while one is recorded."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()
