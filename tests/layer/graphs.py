"""A recorder that stands in for CUDA graphs, which a CPU does not have, and a model for it.

It runs a function again, into the same tensors; tests/gpu/test_graphs.py has the real one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lhcp
from lhcp.layer.graphs import Graphs
from lhcp.layer.module import LighthouseAttention, Mode
from lhcp.layer.recorder import Watch
from lhcp.testing.inputs import qkv, small_config

CONFIG, SEQLEN = small_config(num_strata=8)


class Again:
    """Runs what was recorded again."""

    def __init__(self) -> None:
        self.recorded = 0
        self.device_ms = 2.0

    def refuses(self, device: torch.device) -> str | None:
        return None

    def record(
        self, function: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        with torch.enable_grad():
            results = function()
        self.recorded += 1

        def replay() -> None:
            with torch.enable_grad():
                fresh = function()
            for static, new in zip(results, fresh, strict=True):
                static.detach().copy_(new)

        return results, replay

    def borrow(self, x: Tensor) -> Tensor:
        return x

    def watch(self, function: Callable[[], Tensor]) -> tuple[Tensor, Watch]:
        return function(), Watch(2.0, lambda: self.device_ms)


class Model(nn.Module):
    """Two layers with something trained around them."""

    def __init__(self, group: Any = None, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([lhcp.LighthouseAttention(CONFIG, group) for _ in range(2)])
        self.mix = nn.ParameterList(torch.eye(16, dtype=torch.float64) + 0.1 * i for i in range(2))
        self.checkpointed = checkpointed

    def block(self, layer: nn.Module, mix: Tensor, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return x + layer(x @ mix, k @ mix, v) @ mix

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for layer, mix in zip(self.layers, self.mix, strict=True):
            args = (layer, mix, q, k, v)
            if self.checkpointed:
                q = checkpoint(self.block, *args, use_reentrant=False)
            else:
                q = self.block(*args)
        return q


def with_graphs(model: nn.Module, *, shared: bool = False) -> Graphs:
    graphs = Graphs(shared, recorder=Again())
    for layer in model.modules():
        if isinstance(layer, LighthouseAttention):
            layer.graphs = graphs
    return graphs


def steps(model: Model, group: Any, modes: list[Mode]) -> list[Tensor]:
    """Return the output and all gradients of a step in each mode, with other inputs each."""
    found = []
    for seed, mode in enumerate(modes):
        for layer in model.layers:
            layer.mode = mode
        q, k, v, do = (lhcp.shard(x, group) for x in qkv(SEQLEN, num_kv_heads=2, seed=seed))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        model.zero_grad()
        out = model(*leaves)
        out.backward(do)
        found += [out.detach().clone(), *(x.grad.clone() for x in leaves)]
        found += [p.grad.clone() for p in model.mix]
    return found


def layer_with_graph(**options: Any) -> tuple[LighthouseAttention, Graphs]:
    layer = lhcp.LighthouseAttention(CONFIG, **options)
    return layer, with_graphs(layer)


def called(layer: nn.Module, seed: int, **given: Any) -> tuple[Tensor, list[Tensor], Tensor]:
    q, k, v, do = qkv(SEQLEN, num_kv_heads=2, seed=seed)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    return layer(*leaves, **given), leaves, do


def warm(layer: nn.Module, **given: Any) -> None:
    for seed in range(3):
        out, leaves, do = called(layer, seed, **given)
        torch.autograd.grad(out, leaves, do)
