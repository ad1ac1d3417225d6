"""`measure_step`: what the rotation costs a whole training step of the user's own."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lhcp.comm.mesh import Ranks, new_memory
from lhcp.layer.graphs import Graphs
from lhcp.layer.module import LighthouseAttention
from lhcp.measure.effort import LEAST, MOST, Effort, Progress
from lhcp.measure.rank_values import barrier, gathered, slowest
from lhcp.measure.runs import Recorder, Runner, take_sample
from lhcp.measure.timings import Timing, half_width, is_noise
from lhcp.measure.twins import RandomReceiveBuffers, silent
from lhcp.timing import UNTIMED, Spans


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What messages of the attention cost a step; printed, it is a sentence. Equal on all ranks."""

    real: Timing
    """The step as it is, seconds of the slowest rank."""
    silent: Timing
    """The same step whose attention sends nothing."""
    error: float | None
    """Seconds, half the width of a 95% interval of the difference; None: too few repeats."""
    repeats: int
    num_layers: int
    """Attention layers that were silenced."""
    world_size: int
    """Ranks that share a sequence."""

    @property
    def seconds(self) -> float:
        """What the messages add to a step."""
        return self.real.median - self.silent.median

    @property
    def share(self) -> float:
        """The same, as a share of the step."""
        return self.seconds / self.real.median

    def __str__(self) -> str:
        """Return it in a sentence."""
        if self.world_size == 1:
            return "One rank: nothing rotates, and nothing is lost."
        doubt = "(too few repeats to say how sure)"
        if self.error is not None:
            doubt = f"+- {self.error / self.real.median:.1%}"
        what = f"{self.share:.1%} {doubt} of your step of {self.real.median:.3g} s"
        if is_noise(self.seconds, self.error):
            return f"The rotation's messages are not distinguishable from 0: {what}."
        return f"The rotation's messages cost {what}."


def measure_step(
    step: Callable[[], Any],
    model: nn.Module,
    *,
    budget: float = 30.0,
    repeats: int | None = None,
    warmup: int = 2,
    progress: bool = True,
) -> StepCost:
    """Measure what the messages of a model's attention cost a whole step.

    The step runs as it is, and in turns with that as it would be if the layers' messages cost
    nothing: they send none, and random numbers stand where others' keys would be. So what it does
    to weights is no training. Run it before training or in a process of its own, or leave the
    optimiser out of the step. Modules that are compiled are compiled again for it; there, and with
    `lhcp.graphed`, what memory happens to hold stands for others' keys, so that a step must not
    stop at a loss that is not finite.

    A collective: every rank of the process group must call it alike.

    Args:
        step: does one step, without arguments; always the same messages in the same order.
        model: holds the `LighthouseAttention` layers that the step runs; its own messages, as
            FSDP's, stay.
        budget: seconds that it may take; three repeats are taken in any case.
        repeats: of each of both, in place of a budget; warmup: unmeasured ones before, as many
            as a model with `lhcp.graphed` needs to be recorded, for each.
        progress: whether rank 0 says on stderr how far it is.

    Raises:
        ValueError: the model holds no such layer, or a number is out of its range.
    """
    effort = Effort(budget, repeats, warmup)
    layers = [m for m in model.modules() if isinstance(m, LighthouseAttention)]
    if not layers:
        raise ValueError(
            f"model is a {type(model).__name__} that holds no lhcp.LighthouseAttention, whose "
            "messages could be measured; lhcp.measure_overhead measures sizes alone"
        )
    everybody = Ranks(dist.group.WORLD if dist.is_initialized() else None)
    device = _device(model)
    told = Progress(progress and everybody.rank == 0)
    spans = Recorder(device)

    def timed() -> float:
        barrier(everybody, device)
        seconds = take_sample(Runner(step, lambda: None), "both", spans, 1).seconds
        return slowest(seconds, everybody)

    def both() -> tuple[float, float]:
        twins.loud()
        real = timed()
        twins.quiet()
        return real, timed()

    with Twins(layers, by_operators=is_compiled(model)) as twins:
        told.say(f"steps of a model with {len(layers)} attention layers, {warmup} before")
        for _ in range(warmup):
            both()
        pairs = [both()]
        spent = slowest(told.spent, everybody)
        pair = max(sum(pairs[0]), 1e-6)
        wanted = repeats or max(LEAST, min(MOST, 1 + int((effort.budget - spent) / pair)))
        left = (wanted - 1) * pair
        told.say(f"{spent:.0f} s so far; {wanted} steps of each, about {left:.0f} s")
        while len(pairs) < wanted:
            pairs.append(both())
            told.at(f"{len(pairs)} of {wanted} steps of each")
            late = repeats is None and len(pairs) >= LEAST and told.spent > effort.budget
            if any(gathered(late, everybody)):
                break
    return StepCost(
        real=Timing.of([real for real, _ in pairs]),
        silent=Timing.of([quiet for _, quiet in pairs]),
        error=half_width([real - quiet for real, quiet in pairs]),
        repeats=len(pairs),
        num_layers=len(layers),
        world_size=max(layer.ranks.world_size for layer in layers),
    )


def _device(model: nn.Module) -> torch.device:
    found = next((p.device for p in model.parameters()), torch.device("cpu"))
    return found if found.type == "cuda" else torch.device("cpu")


class Twins:
    """The layers of a model as they are measured, and as they send nothing.

    A context manager: on leaving, the layers are as they were.

    Args:
        layers: of the model.
        by_operators: whether they run through their operators, as compiled layers and graphs do,
            and messages arrive in what memory happens to hold. Else beside them, in both, and in
            silence random numbers arrive.
    """

    def __init__(self, layers: list[LighthouseAttention], *, by_operators: bool) -> None:
        self._layers = layers
        self._by_operators = by_operators or any(layer.graphs is not None for layer in layers)
        self._kept = ExitStack()
        self._buffers = RandomReceiveBuffers()
        self._found = [Way(layer.ranks, layer.graphs, layer.timers) for layer in layers]
        self._loud = self._found
        if not self._by_operators:
            self._loud = [
                replace(way, timers=Spans() if way.timers is UNTIMED else way.timers)
                for way in self._found
            ]
        self._quiet: list[Way] = []

    def __enter__(self) -> "Twins":
        # Layers that share ranks, or graphs, share them in silence too.
        ranks: dict[int, Ranks] = {}
        graphs: dict[int, Graphs] = {}
        for way in self._loud:
            if id(way.ranks) not in ranks:
                quiet = self._kept.enter_context(silent(way.ranks, self._buffers))
                if self._by_operators:
                    quiet = replace(quiet, allocate=new_memory)
                ranks[id(way.ranks)] = quiet
            if way.graphs is not None and id(way.graphs) not in graphs:
                # Those that are there hold messages.
                own = Graphs(way.graphs.shared, way.graphs.always)
                self._kept.callback(own.release)
                graphs[id(way.graphs)] = own
            of_silence = None if way.graphs is None else graphs[id(way.graphs)]
            self._quiet.append(Way(ranks[id(way.ranks)], of_silence, way.timers))
        return self

    def __exit__(self, *error: object) -> None:
        self._put(self._found)
        self._kept.close()

    def loud(self) -> None:
        """Let the layers send their messages from here on."""
        self._put(self._loud)

    def quiet(self) -> None:
        """Let the layers send nothing from here on."""
        self._buffers.restart()
        self._put(self._quiet)

    def _put(self, ways: list["Way"]) -> None:
        for layer, way in zip(self._layers, ways, strict=True):
            layer.ranks, layer.graphs, layer.timers = way.ranks, way.graphs, way.timers


@dataclass(frozen=True)
class Way:
    """What a layer attends with."""

    ranks: Ranks
    graphs: Graphs | None
    timers: Spans


def is_compiled(model: nn.Module) -> bool:
    """Return whether a module of the model is compiled, by `torch.compile` or its own method."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
