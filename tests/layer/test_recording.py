"""One layer with a graph: what is replayed is what would have run, or an error says why not."""

import gc
import weakref

import pytest
import torch
from torch import nn

import lhcp
from lhcp.layer.module import Mode
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


@pytest.mark.parametrize("mode", ["lighthouse", "dense"])
def test_released_graphs_hold_no_memory(mode: Mode) -> None:
    """Fails if what a recording saved outlives it: a stage's graphs beside the next one's."""
    layer, graphs = layer_with_graph()
    layer.mode = mode
    warm(layer)
    (record,) = graphs.recordings.made.values()
    ctx = record.kept[0].grad_fn
    while "RingAttention" not in ctx.name():
        ctx = ctx.next_functions[0][0]
    alive = [weakref.ref(record), weakref.ref(ctx)]
    del record, ctx
    graphs.release()
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
