"""Graphs of layers: which calls get one, recorded by all ranks together, and the same bits."""

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lhcp
from lhcp.layer.graphs import Graphs
from lhcp.layer.module import Mode
from lhcp.layer.recorder import Watch
from lhcp.testing.inputs import qkv
from lhcp.testing.ranks import RankPool
from tests.layer.graphs import (
    CONFIG,
    SEQLEN,
    Model,
    called,
    layer_with_graph,
    steps,
    warm,
    with_graphs,
)

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


def test_another_scale_is_another_graph() -> None:
    """Fails if a call with a scale of its own is answered by the graph of another."""
    layer, graphs = layer_with_graph()
    plain = lhcp.LighthouseAttention(CONFIG)
    for scale in (None, 0.3):
        warm(layer, scale=scale)
    for scale in (0.3, None):
        out, leaves, do = called(layer, 7, scale=scale)
        ours = [out.detach().clone(), *torch.autograd.grad(out, leaves, do)]
        out, leaves, do = called(plain, 7, scale=scale)
        theirs = [out, *torch.autograd.grad(out, leaves, do)]
        assert all(map(torch.equal, ours, theirs))
    assert graphs.recorder.recorded == 4


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


def test_other_lengths_have_graphs_of_their_own() -> None:
    """Fails if a length replays another's graph, records at every change, or fills the memory."""
    layer, graphs = layer_with_graph()
    layer.mode = "dense"
    plain = lhcp.LighthouseAttention(None)
    lengths = [16 * i for i in range(1, 7)]
    for seed in range(4):
        for n in lengths:
            q, k, v, do = qkv(n, num_kv_heads=2, seed=seed)
            leaves = [x.requires_grad_() for x in (q, k, v)]
            ours, theirs = layer(*leaves), plain(*leaves)
            pairs = zip(*(torch.autograd.grad(o, leaves, do) for o in (ours, theirs)), strict=True)
            assert torch.equal(ours, theirs) and all(torch.equal(*pair) for pair in pairs)
    # In dense mode a forward is recorded again, with inputs of its own.
    assert graphs.recorder.recorded == 4 * 3
    assert graphs.eager["more than 4 kinds of calls of one layer"] == 2 * 2


def test_frozen_inputs_have_graphs_of_their_own() -> None:
    """Fails if a gradient comes for an input that wants none, or lacks where one does."""
    layer, graphs = layer_with_graph()
    warm(layer)
    q, k, v, do = qkv(SEQLEN, num_kv_heads=2)
    q.requires_grad_()
    for _ in range(3):
        (grad,) = torch.autograd.grad(layer(q, k, v), q, do)
    (want,) = torch.autograd.grad(lhcp.LighthouseAttention(CONFIG)(q, k, v), q, do)
    assert torch.equal(grad, want) and graphs.eager["first calls"] == 4


def test_what_runs_without_a_graph_says_why() -> None:
    """Fails if a call falls back in silence."""
    layer = lhcp.LighthouseAttention(CONFIG)
    graphs = lhcp.graphed(layer)
    warm(layer)
    assert dict(graphs.eager) == {"inputs are on cpu: graphs need a GPU": 3}
    layer, graphs = layer_with_graph()
    with torch.no_grad():
        called(layer, 0)
    layer.timers = lhcp.Timers()
    warm(layer)
    assert dict(graphs.eager) == {"no gradient is wanted": 1, "timers measure each call": 3}
    with pytest.raises(ValueError, match=r"holds no lhcp\.LighthouseAttention"):
        lhcp.graphed(nn.Linear(1, 1))


@pytest.mark.parametrize("always", [False, True])
def test_what_the_gpu_takes_longer_for_gets_no_graph(always: bool) -> None:
    """Fails if a graph's copies are paid where the host is not what a call waits for."""
    layer, graphs = layer_with_graph()
    graphs.recorder.device_ms, graphs.always = 5.0, always
    warm(layer)
    warm(layer)
    assert graphs.recorder.recorded == (2 if always else 0)
    assert graphs.eager["the GPU takes longer than the host"] == (0 if always else 4)


def test_taken_off_it_is_as_before() -> None:
    layer, graphs = layer_with_graph()
    warm(layer)
    lhcp.ungraphed(nn.Sequential(layer))
    warm(layer)
    assert layer.graphs is None and graphs.recorder.recorded == 2


def test_copies_of_a_layer_record_their_own() -> None:
    """Fails if an average of weights replays the layer's graph, or a pickle holds one."""
    layer, graphs = layer_with_graph()
    warm(layer)
    other = copy.deepcopy(layer)
    assert other.graphs is graphs
    warm(other)
    assert graphs.recorder.recorded == 4
    assert isinstance(pickle.loads(pickle.dumps(layer)).graphs, Graphs)
