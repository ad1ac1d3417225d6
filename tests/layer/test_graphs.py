"""Graphs of layers: what is replayed is what would have run, or an error says why not.

A CPU has no graphs: here a recorder stands in that runs a function again, into the same tensors.
tests/gpu/test_graphs.py has the real one.
"""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lhcp
from lhcp.layer.module import LighthouseAttention, Mode
from lhcp.layer.recorder import Watch
from lhcp.layer.recording import Graphs
from lhcp.testing.inputs import qkv, small_config
from lhcp.testing.ranks import RankPool

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
