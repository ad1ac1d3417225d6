"""Packed documents in the lighthouse layer on a GPU: right, apart, without waiting, as graphs."""

import dataclasses

import pytest
import torch

import lhcp
from lhcp.reference_documents import documents
from lhcp.ring.block import BLOCKS
from tests.documents import KINDS, cu_seqlens
from tests.gpu.problems import NAMES, LayerProblem

PROBLEM = LayerProblem(num_heads=4, num_kv_heads=2, batch=2, packed="random 0")
PACKED = [name for name, block in BLOCKS.items() if block.packed is not None and name != "cpu"]


@pytest.mark.parametrize("kind", KINDS)
def test_within_the_error_budget(kind):
    """Fails if a kernel's mean, sum or choice is another than the oracle's."""
    dataclasses.replace(PROBLEM, packed=kind).check()


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("backend", PACKED)
def test_every_backend_that_takes_documents(backend, head_dim):
    if (why := BLOCKS[backend].missing) is not None:
        pytest.skip(why)
    dataclasses.replace(PROBLEM, head_dim=head_dim, packed="all that fit").check(backend=backend)


@pytest.mark.parametrize("kind", KINDS)
def test_the_selection_is_the_torch_path_s(kind):
    """Fails if scores or forced windows differ by a bit."""
    problem = dataclasses.replace(PROBLEM, packed=kind)
    q, k, _, _ = problem.draw()
    ours, torchs = (problem.select(q, k, kernels) for kernels in ("triton", "torch"))
    assert all(torch.equal(a, b) for a, b in zip(ours, torchs, strict=True))


@pytest.mark.parametrize("made_for_them", [True, False], ids=["selected", "given"])
def test_nothing_leaks(made_for_them):
    """Fails if a bit of a document moves with a token of another, whatever the selection is."""
    problem = dataclasses.replace(PROBLEM, batch=1, packed="random 2")
    of = documents(problem.documents["cu_seqlens"], 1, problem.seqlen)[0].cuda()
    rows = problem.draw()
    plain = dataclasses.replace(problem, packed=None)
    selection = (problem if made_for_them else plain).select(*rows[:2])
    before = problem.answer(*rows, backend="math", selection=selection)
    for token in (0, 1, problem.seqlen // 3, problem.seqlen // 2, problem.seqlen - 1):
        changed = [x.detach().clone() for x in rows[:3]]
        for x in changed:
            x[:, token] += 3
        leaves = [x.requires_grad_() for x in changed]
        after = problem.answer(*leaves, rows[3], backend="math", selection=selection)
        for name, x, y in zip(NAMES, before, after, strict=True):
            moved = (x != y).any(-1).any(-1)[0]
            assert not moved[of != of[token]].any(), (name, token)


def test_the_same_bits_every_run():
    problem = dataclasses.replace(PROBLEM, packed="of one token")
    rows = problem.draw()
    first = problem.answer(*rows, backend="math")
    for _ in range(3):
        again = problem.answer(*rows, backend="math")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("mode", ["lighthouse", "dense"])
def test_a_layer_waits_for_nothing(mode, device):
    """Fails if a layer asks the GPU for a number once the bounds of a step are read."""
    layer = lhcp.LighthouseAttention(PROBLEM.config)
    layer.mode = mode
    q, k, v, dout = PROBLEM.draw()
    given = PROBLEM.documents["cu_seqlens"].to(device)

    def step() -> None:
        torch.autograd.grad(layer(q, k, v, cu_seqlens=given), (q, k, v), dout)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", ["lighthouse", "dense"])
def test_graphs_read_the_documents_of_their_step(mode):
    """Fails if a graph attends to the documents that it was recorded with."""
    found, config = [], PROBLEM.config
    for by_graph in (False, True):
        layer = lhcp.LighthouseAttention(config, backend="math")
        layer.mode = mode
        graphs = lhcp.graphed([layer], always=True) if by_graph else None
        results = []
        for seed in range(8):
            q, k, v, dout = PROBLEM.draw(seed)
            # Alike, so that one graph serves all; moved by a token a step.
            given = cu_seqlens("after strata", config, PROBLEM.seqlen, 1)
            given[1:-1] += seed
            rows = [given[:-1], given + PROBLEM.seqlen]
            out = layer(q, k, v, cu_seqlens=torch.cat(rows))
            grads = torch.autograd.grad(out, (q, k, v), dout)
            results += [out.detach().clone(), *grads]
        found.append(results)
    assert graphs is not None and graphs.eager == {"first calls": 2}
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    graphs.release()


def test_a_graph_around_the_layer_is_refused():
    """Fails if a recording reads bounds from the GPU, or keeps them in silence."""
    problem = PROBLEM
    rows, given = problem.draw(), problem.documents["cu_seqlens"].cuda()
    problem.answer(*rows, backend="math", cu_seqlens=given)
    torch.cuda.synchronize()
    with (
        pytest.raises(ValueError, match=r"use lhcp\.graphed"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        problem.answer(*rows, backend="math", cu_seqlens=given)
