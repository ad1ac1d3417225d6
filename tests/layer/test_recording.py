"""One layer with a graph: what is replayed is what would have run, or an error says why not."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import lhcp
from lhcp.layer.module import Mode
from lhcp.layer.recording import Graphs
from lhcp.testing.inputs import qkv
from tests.layer.graphs import (
    CONFIG,
    SEQLEN,
    called,
    layer_with_graph,
    warm,
    with_graphs,
)


def test_two_forwards_before_a_backward_are_an_error() -> None:
    """Fails if the first one's backward answers with what the second left."""
    layer, _ = layer_with_graph()
    warm(layer)
    first, leaves, do = called(layer, 7)
    called(layer, 8)
    with pytest.raises(RuntimeError, match=r"overwritten.*micro-batch"):
        torch.autograd.grad(first, leaves, do)


def test_another_order_of_backwards_is_an_error() -> None:
    """Fails if memory that two layers' graphs share is read after the other has written it."""
    one, two = (lhcp.LighthouseAttention(CONFIG) for _ in range(2))
    with_graphs(nn.ModuleList([one, two]))
    for _ in range(3):
        a, b = called(one, 1), called(two, 2)
        for out, leaves, do in (b, a):
            torch.autograd.grad(out, leaves, do)
    a, b = called(one, 1), called(two, 2)
    torch.autograd.grad(a[0], a[1], a[2])
    with pytest.raises(RuntimeError, match="reverse order"):
        torch.autograd.grad(b[0], b[1], b[2])
    b, a = called(two, 2), called(one, 1)
    torch.autograd.grad(a[0], a[1], a[2])
    with pytest.raises(RuntimeError, match="reverse order"):
        torch.autograd.grad(b[0], b[1], b[2])


def test_an_output_changed_in_place_is_an_error() -> None:
    """Fails if a backward reads what somebody else has written over the output."""
    layer, _ = layer_with_graph()
    warm(layer)
    out, leaves, do = called(layer, 3)
    with torch.no_grad():
        out.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        torch.autograd.grad(out, leaves, do)


def test_gradients_of_leaves_are_not_overwritten() -> None:
    """Fails if .grad is a graph's own memory, which the next backward fills."""
    layer, _ = layer_with_graph()
    warm(layer)
    out, (q, *_), do = called(layer, 3)
    out.backward(do)
    kept = q.grad.clone()
    warm(layer)
    assert torch.equal(q.grad, kept)


def test_a_second_derivative_is_refused() -> None:
    """Fails if a gradient of a replayed gradient is a number: it would be zero."""
    layer, _ = layer_with_graph()
    warm(layer)
    out, leaves, do = called(layer, 3)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        torch.autograd.grad(out, leaves, do, create_graph=True)


@pytest.mark.parametrize("what", ["selection", "score_q", "score_k", "valid"])
def test_what_is_given_is_read_anew(what: str) -> None:
    """Fails if a graph keeps the selection, scores or padding that it was recorded with."""
    layer, _ = layer_with_graph()
    plain = lhcp.LighthouseAttention(CONFIG)
    for seed in range(4):
        q, k, _, _ = qkv(SEQLEN, num_kv_heads=2, seed=100 + seed)
        valid = (torch.arange(SEQLEN) < SEQLEN - 20 * seed).expand(q.shape[0], -1)
        scores = {"score_q": q, "score_k": k, "valid": valid}
        given = scores.get(what, lhcp.select(q, k, config=CONFIG) if what == "selection" else None)
        ours, leaves, do = called(layer, seed, **{what: given})
        theirs, others, _ = called(plain, seed, **{what: given})
        assert torch.equal(ours, theirs)
        for pair in zip(
            torch.autograd.grad(ours, leaves, do),
            torch.autograd.grad(theirs, others, do),
            strict=True,
        ):
            assert torch.equal(*pair)


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


def test_a_value_that_two_layers_share() -> None:
    """Fails if a gradient that waits for another layer's is overwritten before it is added."""
    found = []
    for by_graph in (False, True):
        layers = nn.ModuleList(lhcp.LighthouseAttention(CONFIG) for _ in range(2))
        if by_graph:
            with_graphs(layers)
        for seed in range(4):
            q, k, v, do = qkv(SEQLEN, num_kv_heads=2, seed=seed)
            leaves = [x.requires_grad_() for x in (q, k, v)]
            out = layers[1](q + layers[0](q, k, v), k, v)
            found.append(torch.autograd.grad(out, leaves, do))
    for ours, theirs in zip(found[4:], found[:4], strict=True):
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


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


@pytest.mark.parametrize("mode", ["lighthouse", "dense"])
def test_released_graphs_hold_no_memory(mode: Mode) -> None:
    """Fails if what a recording saved outlives it: a stage's graphs beside the next one's."""
    layer, graphs = layer_with_graph()
    layer.mode = mode
    warm(layer)
    (record,) = graphs._records.values()
    ctx = record.kept[0].grad_fn
    while "RingAttention" not in ctx.name():
        ctx = ctx.next_functions[0][0]
    alive = [weakref.ref(record), weakref.ref(ctx)]
    del record, ctx
    graphs.release()
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


def test_copies_of_a_layer_record_their_own() -> None:
    """Fails if an average of weights replays the layer's graph, or a pickle holds one."""
    layer, graphs = layer_with_graph()
    warm(layer)
    other = copy.deepcopy(layer)
    assert other.graphs is graphs
    warm(other)
    assert graphs.recorder.recorded == 4
    assert isinstance(pickle.loads(pickle.dumps(layer)).graphs, Graphs)
