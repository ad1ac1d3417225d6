"""CUDA graphs of layers, for real: the same bits as without, through stages and checkpoints."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lhcp
from lhcp.layer.graphs import Graphs
from tests.gpu.problems import NAMES, LayerProblem

PROBLEM = LayerProblem(num_heads=4, num_kv_heads=2, head_dim=64)
LONG = dataclasses.replace(
    PROBLEM, head_dim=128, config=lhcp.LighthouseConfig(topk=512), seqlen=32_768
)
# cuDNN's backward adds in no fixed order, so bits are compared by torch's flash, which can.
BACKEND = "flash"
MODES = ["lighthouse"] * 5 + ["dense"] * 5 + ["lighthouse"] * 2


pytestmark = pytest.mark.usefixtures("deterministic")


def layer_of(problem: LayerProblem, backend: str = BACKEND) -> lhcp.LighthouseAttention:
    return lhcp.LighthouseAttention(problem.config, backend=backend)


class Model(nn.Module):
    """Three layers with something trained around them."""

    def __init__(self, problem: LayerProblem, *, checkpointed: bool = False) -> None:
        super().__init__()
        dim = problem.head_dim
        self.layers = nn.ModuleList(layer_of(problem) for _ in range(3))
        self.mix = nn.ParameterList(
            torch.linspace(0.5, 1 + 0.1 * i, dim).to("cuda", problem.dtype) for i in range(3)
        )
        self.checkpointed = checkpointed

    def block(self, layer: nn.Module, mix: Tensor, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return x + layer(x * mix, k * mix, v * mix) * mix

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for layer, mix in zip(self.layers, self.mix, strict=True):
            args = (layer, mix, q, k, v)
            if self.checkpointed:
                q = checkpoint(self.block, *args, use_reentrant=False)
            else:
                q = self.block(*args)
        return q


def steps(model: Model, problem: LayerProblem, modes: list[str] = MODES) -> list[Tensor]:
    """Output and all gradients of a step in each mode, with other inputs each."""
    found = []
    for seed, mode in enumerate(modes):
        for layer in model.layers:
            layer.mode = mode
        q, k, v, dout = problem.draw(seed)
        model.zero_grad()
        out = model(q, k, v)
        out.backward(dout)
        found += [out.detach().clone(), *(x.grad.clone() for x in (q, k, v))]
        found += [p.grad.clone() for p in model.mix]
    return found


@pytest.mark.parametrize("problem", [PROBLEM, LONG], ids=["short", "long"])
@pytest.mark.parametrize(("checkpointed", "shared"), [(False, False), (True, False), (True, True)])
def test_the_same_bits_through_both_stages(problem, checkpointed, shared):
    """Fails if graphs that share memory overwrite what another still reads."""
    plain = Model(problem, checkpointed=checkpointed)
    model = Model(problem, checkpointed=checkpointed)
    graphs = lhcp.graphed(model, shared=shared, always=True)
    for index, pair in enumerate(zip(steps(plain, problem), steps(model, problem), strict=True)):
        assert torch.equal(*pair), divmod(index, 7)
    assert set(graphs.eager) == {"first calls"}


def test_evaluation_between_steps_changes_nothing():
    """Fails if calls without a gradient run in a graph's memory."""
    plain, model = Model(PROBLEM), Model(PROBLEM)
    graphs = lhcp.graphed(model, always=True)
    for seed in range(5):
        q, k, v, dout = PROBLEM.draw(seed)
        outs = [one(q, k, v) for one in (plain, model)]
        with torch.no_grad():
            model(*PROBLEM.draw(50)[:3])
        grads = [torch.autograd.grad(out, (q, k, v), dout) for out in outs]
        assert torch.equal(*outs) and all(torch.equal(*p) for p in zip(*grads, strict=True))
    assert graphs.eager["no gradient is wanted"] == 15


def test_other_lengths_have_graphs_of_their_own():
    layer, plain = (layer_of(PROBLEM) for _ in range(2))
    lhcp.graphed(layer, always=True)
    double = dataclasses.replace(PROBLEM, seqlen=2 * PROBLEM.seqlen)
    for seed in range(4):
        for problem in (PROBLEM, double):
            q, k, v, dout = problem.draw(seed)
            for one, two in zip(
                (out := layer(q, k, v), *torch.autograd.grad(out, (q, k, v), dout)),
                (out := plain(q, k, v), *torch.autograd.grad(out, (q, k, v), dout)),
                strict=True,
            ):
                assert torch.equal(one, two)


class Untraced(nn.Module):
    """A layer that torch.compile calls and does not trace, as it does one with graphs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    @property
    def mode(self) -> str:
        return self.layer.mode

    @mode.setter
    def mode(self, mode: str) -> None:
        self.layer.mode = mode

    @torch.compiler.disable
    def forward(self, *inputs: Tensor) -> Tensor:
        return self.layer(*inputs)


@pytest.mark.parametrize("mode", ["lighthouse", "dense"])
def test_compiled_around_graphs(mode):
    """Fails if what torch.compile generates around a graph reads or reuses the graph's memory."""
    torch._dynamo.reset()
    plain, model = Model(LONG), Model(LONG)
    plain.layers = nn.ModuleList(map(Untraced, plain.layers))
    graphs = lhcp.graphed(model, always=True)
    for one in (plain, model):
        one.block = torch.compile(one.block)
    modes = [mode] * 6
    for index, pair in enumerate(
        zip(steps(plain, LONG, modes), steps(model, LONG, modes), strict=True)
    ):
        assert torch.equal(*pair), divmod(index, 7)
    assert set(graphs.eager) == {"first calls"}


@pytest.mark.parametrize("mode", ["lighthouse", "dense"])
def test_compiled_into_torchs_own_graphs(mode):
    """Fails if a layer cannot be part of what torch.compile records, messages of one rank none."""
    torch._dynamo.reset()
    layer, plain = (layer_of(LONG) for _ in range(2))
    layer.mode = plain.mode = mode
    compiled = torch.compile(lambda q, k, v: layer(q * 1.0, k, v), mode="reduce-overhead")
    for seed in range(4):
        q, k, v, dout = LONG.draw(seed)
        theirs = plain(q, k, v)
        torch.compiler.cudagraph_mark_step_begin()
        ours = compiled(q, k, v)
        grads = [torch.autograd.grad(out, (q, k, v), dout) for out in (theirs, ours)]
        for name, one, two in zip(NAMES, (theirs, *grads[0]), (ours, *grads[1]), strict=True):
            assert torch.equal(one, two), name


@pytest.mark.parametrize("mode", ["lighthouse", "dense"])
def test_torchs_own_graphs(mode):
    """Fails if a layer cannot be captured by torch.cuda.make_graphed_callables."""
    layer, plain = (layer_of(PROBLEM) for _ in range(2))
    layer.mode = plain.mode = mode
    sample = tuple(x.detach().clone().requires_grad_() for x in PROBLEM.draw(0)[:3])
    by_graph = torch.cuda.make_graphed_callables(layer, sample)
    for seed in range(3):
        q, k, v, dout = PROBLEM.draw(seed)
        theirs = plain(q, k, v)
        ours = by_graph(q, k, v)
        grads = [torch.autograd.grad(out, (q, k, v), dout) for out in (theirs, ours)]
        for name, one, two in zip(NAMES, (theirs, *grads[0]), (ours, *grads[1]), strict=True):
            assert torch.equal(one, two), name


def test_inside_another_graph_it_is_part_of_that():
    """Fails if a layer with graphs cannot be captured with what is around it."""
    layer, plain = (layer_of(PROBLEM) for _ in range(2))
    graphs: Graphs = lhcp.graphed(layer, always=True)
    static = PROBLEM.draw(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer(*static[:3])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(*static[:3])
    fresh = PROBLEM.draw(3)
    with torch.no_grad():
        for ours, theirs in zip(static, fresh, strict=True):
            ours.copy_(theirs)
    graph.replay()
    assert torch.equal(out, plain(*fresh[:3]))
    assert graphs.eager["another graph is being recorded around the layer"] == 1


def test_memory_of_shared_graphs_is_one_layers():
    """Fails if checkpointed layers keep a graph's memory each."""
    peaks = []
    for shared in (None, True):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model = Model(LONG, checkpointed=True)
        graphs = None if shared is None else lhcp.graphed(model, shared=shared, always=True)
        for _ in steps(model, LONG, MODES[:4]):
            pass
        peaks.append(torch.cuda.max_memory_allocated() - before)
        if graphs is not None:
            graphs.release()
    # q, k, v, o and their gradients of one layer, beside the same of the step.
    q, k, *_ = LONG.draw()
    assert peaks[1] - peaks[0] < 12 * (q.nbytes + k.nbytes), peaks
