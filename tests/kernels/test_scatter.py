"""Scatter-back, its edges and its gradients against the torch path in float64."""

import dataclasses

import pytest
import torch

from lhcp.lighthouse import scatter as torch_path
from lhcp.lighthouse.kernels import scatter as kernels
from lhcp.lighthouse.kernels import scatter_backward as backward
from lhcp.lighthouse.kernels.last_rows import add_last_grads, last_rows
from tests.kernels.cases import CASES, STRIDED, assert_close, strided


@pytest.mark.parametrize("name", CASES)
def test_scatter_and_its_edges(name):
    case = CASES[name]
    geom = case.geom
    _, row_of_entry = case.selection()
    o = case.rows(geom.subsequence, case.num_heads)
    exact = torch_path.scatter(o.double(), row_of_entry, geom)
    out = kernels.scatter(o, row_of_entry, geom)
    assert out.dtype == case.dtype
    assert_close(out, exact, case.dtype)

    halo = case.rows(geom.num_chunks * (geom.num_levels - 1), case.num_heads)
    halo = halo.unflatten(1, (geom.num_chunks, geom.num_levels - 1))
    torch_path.scatter_edges(exact, o.double(), row_of_entry, halo.double(), geom)
    before = out.clone()
    kernels.scatter_edges(out, o, row_of_entry, halo, geom)
    assert_close(out, exact, case.dtype)
    edge = geom.window(geom.num_levels - 1) - 1
    beyond = [x.unflatten(1, (geom.num_chunks, -1))[:, :, edge:] for x in (out, before)]
    assert torch.equal(*beyond)


@pytest.mark.parametrize("name", ["two_chunks", "p2_deep", "p3"])
def test_edges_complete_a_cut_sequence_bit_for_bit(name):
    case = CASES[name]
    _, row_of_entry = case.selection()
    o = case.rows(case.geom.subsequence, case.num_heads)
    whole = dataclasses.replace(case, num_chunks=1).geom
    want = kernels.scatter(o, row_of_entry, whole)
    out = kernels.scatter(o, row_of_entry, case.geom)
    halo = torch_path.last_rows(o, row_of_entry, case.geom).roll(1, 1)
    halo[:, 0] = 0
    kernels.scatter_edges(out, o, row_of_entry, halo, case.geom)
    assert torch.equal(out, want)


@pytest.mark.parametrize("name", CASES)
def test_rows_owed_to_the_next_chunk(name):
    """Fails if a row is another entry's, or an absent entry's is not zero."""
    case = CASES[name]
    _, row_of_entry = case.selection()
    o = case.rows(case.geom.subsequence, case.num_heads)
    assert torch.equal(
        last_rows(o, row_of_entry, case.geom), torch_path.last_rows(o, row_of_entry, case.geom)
    )


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_the_rows_owed_to_the_next_chunk(name):
    """Fails if a gradient goes to another row, or an absent entry's is written.

    What arrives lies chunk by chunk in memory, as messages come.
    """
    case = CASES[name]
    geom = case.geom
    _, row_of_entry = case.selection()
    dout = case.rows(geom.num_tokens, case.num_heads)
    do = case.rows(geom.subsequence, case.num_heads)
    shape = (geom.num_chunks, case.batch, geom.num_levels - 1, case.num_heads, case.head_dim)
    received = torch.randn(shape, device=do.device).movedim(0, 1)
    before, exact = do.clone(), do.double()
    torch_path.add_last_grads(exact, dout.double(), received.double(), row_of_entry, geom)
    add_last_grads(do, dout, received, row_of_entry, geom)
    assert_close(do, exact, case.dtype)
    untouched = exact == before.double()
    assert torch.equal(do[untouched], before[untouched])


@pytest.mark.parametrize("name", CASES)
def test_gradient(name):
    case = CASES[name]
    geom = case.geom
    entries, row_of_entry = case.selection()
    dout = case.rows(geom.num_tokens, case.num_heads)
    do = backward.scatter_backward(dout, row_of_entry, geom)
    assert do.dtype == case.dtype
    assert_close(do, torch_path.scatter_backward(dout.double(), entries, geom), case.dtype)

    dhalo = backward.edge_grads(dout, geom)
    assert dhalo.dtype == torch.float32
    assert_close(dhalo, torch_path.edge_grads(dout.double(), geom), torch.float32)


@pytest.mark.parametrize("name", STRIDED)
def test_views(name):
    case = CASES[name]
    geom = case.geom
    _, row_of_entry = case.selection()
    o, dout = (case.rows(x, case.num_heads) for x in (geom.subsequence, geom.num_tokens))
    for run, x in ((kernels.scatter, o), (backward.scatter_backward, dout)):
        assert torch.equal(run(x, row_of_entry, geom), run(strided(x), row_of_entry, geom))
