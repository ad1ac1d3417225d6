"""A model with graphs of its layers: the same bits, recorded by all ranks together."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import lhcp
from lhcp.layer.module import Mode
from lhcp.layer.recorder import Watch
from lhcp.testing.inputs import qkv
from lhcp.testing.ranks import RankPool
from tests.layer.graphs import CONFIG, SEQLEN, Model, layer_with_graph, steps, with_graphs

MODES: list[Mode] = ["lighthouse"] * 4 + ["dense"] * 4 + ["lighthouse"] * 2


def same_steps(group: Any, checkpointed: bool, shared: bool) -> tuple[bool, int, dict[str, int]]:
    """Compare training with graphs and without, bit for bit."""
    plain = steps(Model(group, checkpointed=checkpointed), group, MODES)
    model = Model(group, checkpointed=checkpointed)
    graphs = with_graphs(model, shared=shared)
    ours = steps(model, group, MODES)
    same = all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
    return same, graphs.recorder.recorded, dict(graphs.eager)


@pytest.mark.parametrize(("checkpointed", "shared"), [(False, False), (True, False), (True, True)])
def test_the_same_bits_through_both_stages(checkpointed: bool, shared: bool) -> None:
    """Fails if a replay reads old inputs, or a switch of mode replays the other mode."""
    same, recorded, eager = same_steps(None, checkpointed, shared)
    assert same
    # Forward and backward, of each layer and mode, and again when the mode comes back; in dense
    # mode a forward twice, since its backward reads the inputs.
    assert recorded == (5 if shared else 14)
    assert set(eager) == {"first calls"}
    assert eager["first calls"] == 8


@pytest.mark.parametrize("shared", [False, True])
def test_the_same_bits_across_ranks(ranks: RankPool, shared: bool) -> None:
    """Fails if a replay sends other messages than the call that it stands for."""
    for same, recorded, _ in ranks.run(same_steps, 2, shared, shared):
        assert same and recorded == (5 if shared else 14)


def paced_steps(group: Any, device_ms: list[float]) -> tuple[list[Tensor], int, int]:
    """Train on this rank whose GPU takes so long for what its host launches in 2 ms."""
    model = Model(group)
    graphs = with_graphs(model)
    graphs.recorder.device_ms = device_ms[dist.get_rank(group)]
    found = steps(model, group, ["lighthouse"] * 4)
    return found, graphs.recorder.recorded, graphs.eager["the GPU takes longer than the host"]


@pytest.mark.parametrize(
    ("device_ms", "recorded"), [([2.0, 9.0], 4), ([9.0, 2.0], 4), ([9.0, 9.0], 0)]
)
def test_ranks_record_together(ranks: RankPool, device_ms: list[float], recorded: int) -> None:
    """Fails if a rank launches call by call and holds up one that has graphs.

    The GPU of a rank that waits for the other's messages looks busy: its word is not enough.
    """
    for _, made, eager in ranks.run(paced_steps, 2, device_ms):
        assert made == recorded and eager == (0 if recorded else 4)


def test_a_late_layer_or_two_do_not_decide() -> None:
    """Fails if a graph is left out because some calls of the first steps were held up."""
    model = Model()
    model.layers.extend(lhcp.LighthouseAttention(CONFIG) for _ in range(2))
    model.mix.extend(model.mix[0].detach().clone() for _ in range(2))
    graphs = with_graphs(model)
    took = iter([9.0, 2.0, 9.0, 9.0])
    graphs.recorder.watch = lambda function: (function(), Watch(2.0, partial(next, took)))
    steps(model, None, ["lighthouse"] * 3)
    assert graphs.recorder.recorded == 8


def test_a_checkpoint_around_the_layer_alone() -> None:
    """Fails if what ends its second call midway, once all that is saved is there, leaves no way."""
    layer, graphs = layer_with_graph()
    for seed in range(4):
        q, k, v, do = qkv(SEQLEN, num_kv_heads=2, seed=seed)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = checkpoint(layer, *leaves, use_reentrant=False)
        found = [out.detach().clone(), *torch.autograd.grad(out, leaves, do)]
        plain = lhcp.LighthouseAttention(CONFIG)(*leaves)
        want = [plain.detach(), *torch.autograd.grad(plain, leaves, do)]
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert graphs.recorder.recorded == 2


def test_compiled_around_it() -> None:
    """Fails if torch.compile traces into a graph, or records while it traces."""
    torch._dynamo.reset()
    model, plain = Model(), Model()
    graphs = with_graphs(model)
    for layer in (model, plain):
        layer.block = torch.compile(layer.block, backend="aot_eager")
    ours, theirs = (steps(m, None, MODES) for m in (model, plain))
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(ours, theirs, strict=True))
    assert graphs.recorder.recorded == 14
