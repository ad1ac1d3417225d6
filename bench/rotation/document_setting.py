"""All that is timed of one length, mode and backend in `bench.rotation.documents`, in turn."""

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import lhcp
from bench.common.problem import AttentionProblem, Choice
from bench.common.turns import Spread
from bench.rotation.document_arms import RINGS, VARLEN, Documents
from bench.rotation.document_balance import draw_starts, work_of_chunks
from lhcp.comm.layout import make_layout
from lhcp.comm.mesh import Ranks
from lhcp.layer.choices import Choices
from lhcp.layer.graphs import CALLS_BEFORE
from lhcp.layer.module import LighthouseAttention
from lhcp.layer.plan import make_plan
from lhcp.measure.clock import elapsed
from lhcp.measure.rank_values import barrier, gathered, slowest

Run = Callable[[], Any]
Row = dict[str, Any]

# Seconds of a call that is measured twice, not in a row: the GPU alone sets its pace.
LONG = 1.0
# A document's length is a multiple of this, which ring-flash-attn wants of 2 W.
MULTIPLE = 16


def draw_bounds(seqlen: int, mean: int, sigma: float, seed: int) -> Tensor:
    """Return first tokens of documents, int64 on the CPU; lengths are multiples of `MULTIPLE`."""
    drawn = draw_starts(seqlen, mean, sigma, torch.Generator().manual_seed(seed))
    return torch.unique_consecutive(drawn // MULTIPLE * MULTIPLE)


def call(attend: Callable[..., Tensor], inputs: tuple[Tensor, ...], **more: Any) -> Run:
    """Return a call of attend(q, k, v) with its backward."""
    *leaves, dout = inputs
    leaves = [x.requires_grad_() for x in leaves]

    def run() -> tuple[Tensor, ...]:
        out = attend(*leaves, **more)
        return torch.autograd.grad(out, leaves, dout)

    return run


def peak_gib(run: Run, inputs: tuple[Tensor, ...], device: torch.device) -> float:
    """Return the GiB of a call at most, its own inputs included and nothing else that is held."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    held = torch.cuda.max_memory_allocated(device) - before + sum(x.nbytes for x in inputs)
    return held / 2**30


def first_samples(run: Run, ranks: Ranks, device: torch.device) -> list[float]:
    """Return seconds of a call, and of a second one where it is long; without one that compiled."""
    run_once = partial(elapsed, run, device)
    barrier(ranks, device)
    first = slowest(run_once(), ranks)
    barrier(ranks, device)
    second = slowest(run_once(), ranks)
    return [first, second] if first < 1.2 * second else [second]


def in_turn(
    arms: dict[str, Run],
    first: dict[str, list[float]],
    ranks: Ranks,
    device: torch.device,
    repeats: int,
) -> dict[str, Spread]:
    """Time arms in turn, there and back again, in ms; the slowest rank counts. A collective.

    Args:
        first: of each arm that is timed, what `first_samples` found.
    """
    short = {name: found[-1] for name, found in first.items() if found[-1] <= LONG}
    samples = {name: [] if name in short else found for name, found in first.items()}
    for i in range(repeats):
        for name in list(short)[:: -1 if i % 2 else 1]:
            calls = max(1, min(10, int(0.05 / short[name])))
            barrier(ranks, device)
            samples[name].append(slowest(elapsed(arms[name], device, calls), ranks))
    return {name: Spread.of([1e3 * s for s in found]) for name, found in samples.items()}


class Setting:
    """All arms of one length, mode and backend."""

    def __init__(
        self, args: Namespace, problem: AttentionProblem, choice: Choice, device: Any
    ) -> None:
        self.args, self.problem, self.choice, self.device = args, problem, choice, device
        self.ranks, self.seqlen = choice.ranks, problem.seqlen
        self.inputs = problem.own(self.ranks, device)
        self.starts = {
            mean: draw_bounds(self.seqlen, mean, args.sigma, args.seed)
            for mean in [*(self.seqlen // part for part in args.parts), *args.means]
        }
        self.without: dict[str, str] = {}
        """Arms that are not there, and why."""

    def layer(self) -> LighthouseAttention:
        choice = self.choice
        layer = LighthouseAttention(
            self.problem.config, self.ranks, rotation=choice.rotation, backend=choice.backend
        )
        layer.mode = "dense" if self.problem.config is None else "lighthouse"
        return layer

    def given(self, mean: int | None) -> Row:
        """Return what a layer is given beside q, k, v."""
        if mean is None:
            return {}
        # On the device, as a loader of GPU batches has it: read once, like any other.
        bounds = torch.cat([self.starts[mean], torch.tensor([self.seqlen])]).int()
        return {"cu_seqlens": bounds.to(self.device)}

    def rotation(self, packed: bool) -> str:
        """Return the rotation that the layer takes."""
        q, k, *_ = self.inputs
        choices = Choices(rotation=self.choice.rotation, backend=self.choice.backend)
        tokens = self.problem.attended // self.ranks.world_size
        return make_plan(q, k, self.ranks, choices, tokens=tokens, packed=packed).rotation

    def described(self, mean: int) -> Row:
        """Return how many documents there are, and how much work they leave, to whom."""
        starts, layout = self.starts[mean], make_layout("zigzag", self.ranks.world_size)
        work = work_of_chunks(starts, self.seqlen, layout.num_chunks).double()
        ranks = range(self.ranks.world_size)
        of_rank = torch.stack([work[list(layout.chunks(rank))].sum() for rank in ranks])
        return {
            "count": len(starts),
            "pairs over plain": float(2 * work.sum() / (self.seqlen * (self.seqlen + 1))),
            "busiest rank over mean": float(of_rank.max() / of_rank.mean()),
        }

    def launched(self) -> dict[str, Run]:
        """Return the layer, without documents and with each."""
        arms = {"plain": call(self.layer(), self.inputs)}
        for mean in self.starts:
            arms[f"packed {mean}"] = call(self.layer(), self.inputs, **self.given(mean))
        return arms

    def others(self) -> dict[str, Run]:
        """Return the attention of other packages with each set of documents; dense only."""
        arms: dict[str, Run] = {}
        name = self.choice.backend
        if self.problem.config is not None or self.device.type != "cuda" or name not in VARLEN:
            return arms
        # The whole sequence is on every GPU.
        whole = self.problem.whole(self.device) if self.ranks.world_size > 1 else self.inputs
        for mean, starts in self.starts.items():
            docs = Documents.of(starts, self.seqlen, self.device)
            made = {f"varlen {mean}": (partial(VARLEN[name], docs), whole)}
            if self.ranks.world_size > 1 and name == "flash_attn":
                for ring, of in RINGS.items():
                    made[f"{ring} {mean}"] = (partial(of, docs, self.ranks), self.inputs)
            for arm, (make, inputs) in made.items():
                try:
                    arms[arm] = call(make(), inputs)
                except ImportError as error:
                    self.without[arm] = str(error)
        return arms

    def graphs(self, launched: dict[str, Spread]) -> tuple[dict[str, Run], list[Any]]:
        """Return the layer as CUDA graphs, recorded, of what is short; and what to release."""
        arms, recorded = {}, []
        for mean in (None, *self.starts):
            of = "plain" if mean is None else f"packed {mean}"
            if launched[of].median >= self.args.graphs_below:
                continue
            name = f"{of} graph"
            layer = self.layer()
            graphs = lhcp.graphed([layer], always=True)
            run = call(layer, self.inputs, **self.given(mean))
            for _ in range(CALLS_BEFORE + 1):
                run()
            calls_before = dict(graphs.eager)
            run()
            if dict(graphs.eager) != calls_before or sum(calls_before.values()) != CALLS_BEFORE:
                self.without[name] = f"not recorded: {dict(graphs.eager)}"
            else:
                arms[name] = run
            recorded.append(graphs)
        return arms, recorded

    def measure(self) -> Row:
        """Return one row; a collective."""
        args, device, ranks = self.args, self.device, self.ranks
        launched = self.launched()
        for run in launched.values():
            run()
        peaks = {}
        if device.type == "cuda":
            of_inputs = {name: peak_gib(r, self.inputs, device) for name, r in launched.items()}
            peaks = {name: max(gathered(gib, ranks)) for name, gib in of_inputs.items()}
        arms = launched | self.others()
        first = {name: first_samples(run, ranks, device) for name, run in launched.items()}
        for name, run in arms.items():
            if name not in launched:
                try:
                    first[name] = first_samples(run, ranks, device)
                except (RuntimeError, AssertionError, TypeError) as error:
                    self.without[name] = f"{type(error).__name__}: {error}"
        found = in_turn(arms, first, ranks, device, args.repeats)
        if device.type == "cuda":
            arms, recorded = self.graphs(found)
            first = {name: first_samples(run, ranks, device) for name, run in arms.items()}
            found |= in_turn(arms, first, ranks, device, args.repeats)
            for graphs in recorded:
                graphs.release()
        return {
            "seqlen": self.seqlen,
            "mode": "dense" if self.problem.config is None else "lighthouse",
            "backend": self.choice.backend,
            "ranks": ranks.world_size,
            "rotation": {"plain": self.rotation(False), "packed": self.rotation(True)},
            "documents": {mean: self.described(mean) for mean in self.starts},
            "ms": found,
            "peak_gib": peaks,
            "without": self.without,
        }
