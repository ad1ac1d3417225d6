"""`measure_step` on ranks: its twin sends nothing, and the model is as it was."""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import lhcp
from lhcp.comm.torch_private import is_fake
from lhcp.testing.inputs import small_config
from lhcp.testing.ranks import RankPool
from lhcp.timing import UNTIMED


class Two(nn.Module):
    """A lighthouse layer and a dense one of one group."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        config, self.seqlen = small_config(num_strata=8)
        cp = lhcp.ContextParallel(group)
        self.layers = nn.ModuleList([cp.attention(config), cp.attention(None)])
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x * self.weight, x, x)
        return x


def measure(group: Any, compiled: bool) -> list[Any]:
    model = Two(group)
    if compiled:
        model.compile(backend="aot_eager")
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(1, model.seqlen // group.size(), 2, 8, generator=generator)
    expected = model(x).detach()
    silent, same, finite = [], [], []

    def step() -> None:
        quiet = {is_fake(layer.ranks.flat) for layer in model.layers}  # type: ignore[arg-type]
        silent.append(quiet)
        out = model(x)
        out.sum().backward()
        same.append(torch.equal(out, expected))
        finite.append(bool(out.isfinite().all()))
        # Longer than this step's noise: what the twin must be found to save.
        time.sleep(0.0 if quiet == {True} else 0.2)

    before = [(layer.ranks, layer.graphs) for layer in model.layers]
    cost = lhcp.measure_step(step, model, repeats=3, warmup=1, progress=False)
    after = [(layer.ranks, layer.graphs) for layer in model.layers]
    untimed = all(layer.timers is UNTIMED for layer in model.layers)
    again = torch.equal(model(x), expected)
    return [silent, same, all(finite), before == after and untimed and again, cost]


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"]
)
def test_a_twin_sends_nothing_and_nothing_stays(ranks: RankPool, compiled: bool) -> None:
    """Fails if both steps are alike, a step computes something else, or the layers stay silent."""
    answers = ranks.run(measure, 4, compiled)
    for silent, same, finite, restored, cost in answers:
        assert silent == [{False}, {True}] * 4
        assert same == [True, False] * 4
        # Compiled, what memory holds stands for others' keys: in these tests NaN.
        assert finite != compiled and restored
        assert cost == answers[0][-1]
        assert (cost.repeats, cost.num_layers, cost.world_size) == (3, 2, 4)
        assert 0.1 < cost.seconds < 0.4 and "of your step" in str(cost)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a Linear that holds no lhcp\.LighthouseAttention"):
        lhcp.measure_step(lambda: None, nn.Linear(1, 1))
    with pytest.raises(ValueError, match="budget=0: must be a positive"):
        lhcp.measure_step(lambda: None, nn.Linear(1, 1), budget=0)
