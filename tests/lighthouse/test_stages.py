"""Pool, gather and scatter against the reference; chunks simulated in one process; operators."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lhcp import LighthouseConfig, reference
from lhcp.lighthouse import gather, operators, pool, scatter
from lhcp.lighthouse.geometry import Geometry
from lhcp.lighthouse.norms import level_scores, token_scores
from lhcp.lighthouse.select import Selection, select
from lhcp.operators import pack_integers
from lhcp.precision import wide
from lhcp.testing.inputs import qkv, small_config
from tests.cases import strided

SIZES = [(2, 2), (2, 8), (3, 2), (3, 4), (4, 2), (4, 3)]
SIZE_IDS = [f"L{num_levels}p{pool_factor}" for num_levels, pool_factor in SIZES]


def setting(
    num_levels: int, pool_factor: int, dtype: torch.dtype = torch.float64, head_dim: int = 5
) -> tuple[LighthouseConfig, Geometry, tuple[Tensor, Tensor, Tensor, Tensor], Selection]:
    """A small problem of 4 strata: inputs [3, N, 4 and 2, D] and its selection."""
    config, seqlen = small_config(num_levels, pool_factor, num_strata=4)
    inputs = qkv(
        seqlen, batch=3, num_kv_heads=2, head_dim=head_dim, dtype=dtype, seed=num_levels + seqlen
    )
    geom = Geometry.local(config, seqlen, 1, 1, 0)
    scores = (level_scores(token_scores(x, 2), geom) for x in inputs[:2])
    return config, geom, inputs, select(*scores, geom)


def in_chunks(geom: Geometry, num_chunks: int) -> Geometry:
    """The same tokens as several chunks that owe each other rows."""
    return Geometry(**{**vars(geom), "num_chunks": num_chunks})


def as_reference(selection: Selection, geom: Geometry) -> reference.ReferenceSelection:
    return reference.ReferenceSelection(selection.levels(geom), selection.indices(geom))


@pytest.mark.parametrize("size", SIZES, ids=SIZE_IDS)
def test_pool_equals_the_reference(size: tuple[int, int]) -> None:
    """Fails if a window is off by one, or a level is pooled from rounded means."""
    config, geom, (q, *_), _ = setting(*size)
    expected = torch.cat(reference.pool(q, config)[1:], 1)
    assert torch.allclose(pool.pool(q, geom), expected, rtol=1e-14, atol=1e-14)
    assert torch.equal(pool.pool(strided(q), geom), pool.pool(q, geom))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_pool_rounds_once(dtype: torch.dtype) -> None:
    """Fails if means of low precision are summed in low precision or rounded twice."""
    config, geom, (q, *_), _ = setting(4, 2, dtype)
    exact = torch.cat(reference.pool(q.double(), config)[1:], 1)
    got = pool.pool(q, geom).double()
    half_ulp = 0.5 * torch.finfo(dtype).eps * exact.abs()
    assert bool(((got - exact).abs() <= half_ulp + 2e-6 * exact.abs().max()).all())


@pytest.mark.parametrize("size", SIZES, ids=SIZE_IDS)
def test_gather_equals_the_reference(size: tuple[int, int]) -> None:
    """Fails if a place reads another entry, or a query head another group's order."""
    config, geom, (q, k, _, _), selection = setting(*size)
    for x in (q, k):
        expected = reference.gather(x, as_reference(selection, geom), config)
        got = gather.gather_one(x, pool.pool(x, geom), selection.entries)
        assert torch.allclose(got, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("size", SIZES, ids=SIZE_IDS)
def test_gather_backward_is_the_reference_gradient(size: tuple[int, int]) -> None:
    """Fails if a token misses an entry's share, or the mean's divisor is wrong."""
    config, geom, (q, k, _, _), selection = setting(*size)
    for x in (q, k):
        x = x.clone().requires_grad_()
        sub = reference.gather(x, as_reference(selection, geom), config)
        dsub = torch.randn(sub.shape, dtype=sub.dtype, generator=torch.Generator().manual_seed(1))
        (expected,) = torch.autograd.grad(sub, x, dsub)
        got = gather.gather_backward_one(dsub, selection.row_of_entry, geom)
        assert torch.allclose(got, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("size", SIZES, ids=SIZE_IDS)
def test_scatter_and_its_gradient_equal_the_reference(size: tuple[int, int]) -> None:
    """Fails if the served run of an entry is shifted, cut short or runs past the end."""
    config, geom, _, selection = setting(*size)
    o = torch.randn(3, geom.subsequence, 4, 5, generator=torch.Generator().manual_seed(2)).double()
    o.requires_grad_()
    expected = reference.scatter(o, as_reference(selection, geom), geom.num_tokens, config)
    got = scatter.scatter(o.detach(), selection.row_of_entry, geom)
    assert torch.allclose(got, expected, rtol=1e-14, atol=1e-14)
    dout = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3)).double()
    (do,) = torch.autograd.grad(expected, o, dout)
    ours = scatter.scatter_backward(dout, selection.entries, geom)
    assert torch.allclose(ours, do, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("num_chunks", [2, 4])
@pytest.mark.parametrize("size", SIZES, ids=SIZE_IDS)
def test_chunks_that_exchange_rows_equal_one_chunk(
    size: tuple[int, int], num_chunks: int, dtype: torch.dtype
) -> None:
    """Fails if what is owed across a chunk's end is lost, or summed or rounded in another order."""
    _, geom, _, selection = setting(*size, dtype)
    cut, rows = in_chunks(geom, num_chunks), selection.row_of_entry
    generator = torch.Generator().manual_seed(4)
    o = torch.randn(3, geom.subsequence, 4, 5, generator=generator).to(dtype)
    out = scatter.scatter(o, rows, cut)
    owed = scatter.last_rows(o, rows, cut)
    halo = torch.cat([torch.zeros_like(owed[:, :1]), owed[:, :-1]], 1)
    scatter.scatter_edges(out, o, rows, halo, cut)
    assert torch.equal(out, scatter.scatter(o, rows, geom))

    dout = torch.randn(3, geom.num_tokens, 4, 5, generator=generator).to(dtype)
    do = scatter.scatter_backward(dout, selection.entries, cut)
    grads = scatter.edge_grads(dout, cut)
    assert grads.dtype == wide(dtype)
    received = torch.cat([grads[:, 1:], torch.zeros_like(grads[:, :1])], 1)
    scatter.add_last_grads(do, dout, received, rows, cut)
    exact = scatter.scatter_backward(dout.double(), selection.entries, geom)
    eps = 2 * torch.finfo(wide(dtype)).eps * exact.abs().max()
    error = (do.double() - exact).abs()
    assert bool((error <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 8 * eps).all())


@pytest.mark.parametrize("size", SIZES, ids=SIZE_IDS)
def test_coverage(size: tuple[int, int]) -> None:
    """Fails if a position gets nothing, or more than one entry of a level."""
    _, geom, _, selection = setting(*size)
    ones = torch.ones(3, geom.subsequence, 2, 1, dtype=torch.float64)
    fan_in = scatter.scatter(ones, selection.row_of_entry, geom)
    assert fan_in.min() >= 1 and fan_in.max() <= geom.num_levels


def swapped(x: Tensor) -> Tensor:
    """The same values with the last axis before the heads in memory."""
    return x.mT.contiguous().mT


@pytest.mark.parametrize("change", [strided, swapped], ids=["strided", "swapped"])
def test_operators_take_any_strides(change: Callable[[Tensor], Tensor]) -> None:
    """Fails if an operator assumes contiguous inputs."""
    _, geom, (q, k, v, _), selection = setting(3, 3)
    sizes = pack_integers(geom)
    expected = operators.pool_and_score(q, k, v, sizes, True, "torch")
    changed = operators.pool_and_score(*map(change, (q, k, v)), sizes, True, "torch")
    for one, two in zip(expected, changed, strict=True):
        assert torch.equal(one, two)
    entries = selection.entries
    expected = operators.gather_subsequence([q, k, v], list(expected[:3]), entries, sizes, "torch")
    changed = operators.gather_subsequence(
        [*map(change, (q, k, v))], [*map(change, changed[:3])], entries, sizes, "torch"
    )
    for one, two in zip(expected, changed, strict=True):
        assert torch.equal(one, two)
