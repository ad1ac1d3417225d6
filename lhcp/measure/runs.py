"""What `measure_overhead` times: the real thing, its twins, one device alone."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lhcp.comm.mesh import Ranks
from lhcp.config import LighthouseConfig
from lhcp.layer.boundary import BoundaryExchange
from lhcp.layer.lighthouse import lighthouse_attention
from lhcp.layer.plan import carry_out
from lhcp.measure.twins import Communication, RandomReceiveBuffers
from lhcp.ring.plan import RingPlan
from lhcp.timing import UNTIMED, Spans

SpanRecord = tuple[str, str, int, float, float]
"""(stage, kind, step, start, stop), seconds since the measurement began."""


class Recorder(Spans):
    """Spans with their place in time, of one measurement on this rank."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = self.launches = device.type == "cuda"
        self._device = device
        self._spans: list[tuple[str, str, int, Any, Any]] = []
        self._begin: Any = None

    def begin(self) -> None:
        """Forget everything; time starts now."""
        self._spans.clear()
        if self._cuda:
            torch.cuda.synchronize(self._device)
        self._begin = self._now()

    def end(self) -> tuple[float, list[SpanRecord]]:
        """Return seconds since `begin`, and (stage, kind, step, start, stop) of every span."""
        stop = self._now()
        if self._cuda:
            torch.cuda.synchronize(self._device)
        marks = [(*span[:3], self._since(span[3]), self._since(span[4])) for span in self._spans]
        return self._since(stop), marks

    @contextmanager
    def span(self, stage: str, kind: str, step: int, device: torch.device) -> Iterator[None]:
        """Open a span, and keep when it began and ended."""
        with super().span(stage, kind, step, device):
            start = self._now()
            yield
            self._spans.append((stage, kind, step, start, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _since(self, moment: Any) -> float:
        if not self._cuda:
            return float(moment - self._begin)
        return float(self._begin.elapsed_time(moment)) / 1e3


@dataclass(frozen=True)
class Sample:
    """One measurement on one rank."""

    seconds: float
    """Of one call."""
    spans: list[SpanRecord]
    """Of all calls."""
    calls: int
    host: float | None = None
    """Of the first call, until the host had launched it; None where the host computes itself."""

    @property
    def first_call(self) -> list[SpanRecord]:
        """The spans of the first call."""
        return self.spans[: len(self.spans) // self.calls]


@dataclass(frozen=True)
class Runner:
    """One thing to time, in two directions; `backward` comes after `forward`."""

    forward: Callable[[], Any]
    backward: Callable[[], Any]
    finite: Callable[[], bool] = lambda: True
    """Whether the last forward's output is finite."""

    def run(self, phase: str) -> None:
        """Run "forward", "backward" or "both"."""
        if phase != "backward":
            self.forward()
        if phase != "forward":
            self.backward()


def filled(runner: Runner, buffers: RandomReceiveBuffers) -> Runner:
    """Return the runner of a twin that sends nothing, with numbers where others' would be."""

    def anew(run: Callable[[], Any]) -> Callable[[], Any]:
        def inner() -> Any:
            buffers.restart()
            return run()

        return inner

    return Runner(anew(runner.forward), anew(runner.backward), runner.finite)


def take_sample(runner: Runner, phase: str, spans: Recorder, calls: int) -> Sample:
    """Time `calls` runs in a row."""
    spans.begin()
    begin = time.perf_counter()
    runner.run(phase)
    # Of the first call alone: a host that is far ahead of its GPU has to wait for it.
    host = time.perf_counter() - begin if spans.launches else None
    for _ in range(calls - 1):
        runner.run(phase)
    seconds, records = spans.end()
    return Sample(seconds / calls, records, calls, host)


def differentiable(
    function: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor
) -> Runner:
    """Return a runner of function(q, k, v) -> out and of its backward from a random gradient."""
    inputs = tuple(x.detach().requires_grad_() for x in (q, k, v))
    dout = torch.randn_like(q)
    out: list[Tensor] = []

    def forward() -> None:
        # The last graph goes first: its nodes remember the stream that they were made on.
        out.clear()
        out.append(function(*inputs))

    def backward() -> None:
        torch.autograd.grad(out[0], inputs, dout, retain_graph=True)

    def finite() -> bool:
        return bool(out[0].isfinite().all())

    return Runner(forward, backward, finite)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Sizes and choices, checked and resolved; `tokens` and `entries` are of the whole sequence."""

    config: LighthouseConfig | None
    tokens: int
    entries: int
    heads: tuple[int, int]
    head_dim: int
    batch: int
    dtype: torch.dtype
    device: torch.device
    plan: RingPlan
    kernels: str

    def draw(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw q, k, v of so many tokens."""
        counts = (self.heads[0], self.heads[1], self.heads[1])
        q, k, v = (
            torch.randn(self.batch, tokens, n, self.head_dim, dtype=self.dtype, device=self.device)
            for n in counts
        )
        return q, k, v

    def attention(self, plan: RingPlan, spans: Spans, entries: int) -> Runner:
        """Return the attention over so many entries a rank."""

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return carry_out(q, k, v, plan, spans)[0]

        return differentiable(run, *self.draw(entries))

    def layer(self, ranks: Ranks, spans: Spans, tokens: int) -> Runner:
        """Return the whole layer over so many tokens a rank."""
        config, plan = self.config, self.plan
        assert config is not None

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return lighthouse_attention(
                q,
                k,
                v,
                config=config,
                group=ranks,
                layout=plan.layout.name,
                rotation=plan.rotation,
                backend=plan.backend,
                kernels=self.kernels,
                timers=spans,
            )

        return differentiable(run, *self.draw(tokens))

    def messages(self, spans: Spans, layer: bool = False) -> Runner:
        """Return the communication-only twin of the attention, or of the whole layer."""
        plan = self.plan
        twin = Communication(self.draw(plan.shape.tokens), plan, spans)
        if not layer or plan.ranks.world_size == 1:
            return Runner(twin.forward, twin.backward)
        assert self.config is not None
        chunks, levels = plan.layout.chunks_per_rank, self.config.num_levels - 1
        shape = (self.batch, chunks, levels, self.heads[0], self.head_dim)
        rows = torch.randn(shape, dtype=self.dtype, device=self.device)

        def owed(back: bool) -> None:
            BoundaryExchange(rows, plan.ranks, plan.layout, back=back, spans=spans).wait()

        def forward() -> None:
            twin.forward()
            owed(False)

        def backward() -> None:
            owed(True)
            twin.backward()

        return Runner(forward, backward)


def single(job: Job, limit: float) -> tuple[Runner, int]:
    """Return attention on one device, over the longest S / 2^i that keeps to the limits."""
    plan = job.plan.on_one_rank(*job.heads)
    spans = Recorder(job.device)

    def runner(entries: int) -> Runner:
        of_length = replace(plan, shape=replace(plan.shape, seqlen=entries))
        return job.attention(of_length, UNTIMED, entries)

    lengths = [job.entries >> i for i in range(job.entries.bit_length())]
    best = next((n for n in lengths if n <= 1024), lengths[-1])
    while True:
        chosen = runner(best)
        seconds = min(take_sample(chosen, "both", spans, 1).seconds for _ in range(2))
        longer = lengths[lengths.index(best) - 1] if best < job.entries else None
        if longer is None or 4 * seconds > limit or not _fits(job, longer):
            return chosen, best
        best = longer


def _fits(job: Job, entries: int) -> bool:
    """Return whether one device has memory for attention over so many tokens, both directions."""
    if job.device.type != "cuda":
        return True
    row = job.batch * job.heads[0] * job.head_dim * job.dtype.itemsize
    needed = 12 * entries * row
    if job.plan.backend == "math":
        needed += 12 * job.batch * job.heads[0] * entries * entries
    return needed < 0.8 * torch.cuda.mem_get_info(job.device)[0]


def single_layer(job: Job) -> dict[str, Runner]:
    """Return the whole layer on one device, where its memory allows."""
    try:
        runner = job.layer(Ranks(), UNTIMED, job.tokens)
        runner.run("both")
    except torch.cuda.OutOfMemoryError:
        return {}
    return {"layer_single": runner}
