"""The gather, exact, and its gradient against the torch path in float64."""

import pytest
import torch

from lhcp.lighthouse import gather as torch_path
from lhcp.lighthouse.kernel_set import QKV
from lhcp.lighthouse.kernels import gather as kernels
from tests.kernels.cases import CASES, STRIDED, assert_close, strided


@pytest.mark.parametrize("name", CASES)
def test_gather_equals_torch_path(name):
    case = CASES[name]
    geom = case.geom
    entries, _ = case.selection()
    tokens, pooled = case.qkv(geom.num_tokens), case.qkv(geom.pooled_size)
    got = kernels.gather(tokens, pooled, entries, geom)
    for x, p, g in zip(tokens, pooled, got, strict=True):
        assert torch.equal(g, torch_path.gather_one(x, p, entries))


@pytest.mark.parametrize("name", CASES)
def test_gradient(name):
    case = CASES[name]
    geom = case.geom
    _, row_of_entry = case.selection()
    grads = case.qkv(geom.subsequence)
    got = kernels.gather_backward(grads, row_of_entry, geom)
    for dsub, dx in zip(grads, got, strict=True):
        assert dx.dtype == case.dtype
        assert_close(
            dx, torch_path.gather_backward_one(dsub.double(), row_of_entry, geom), case.dtype
        )


@pytest.mark.parametrize("name", STRIDED)
def test_views(name):
    case = CASES[name]
    geom = case.geom
    entries, row_of_entry = case.selection()
    rows = case.qkv(geom.num_tokens), case.qkv(geom.pooled_size)
    got = kernels.gather(*rows, entries, geom)
    viewed = kernels.gather(*(QKV(*map(strided, x)) for x in rows), entries, geom)
    assert all(torch.equal(a, b) for a, b in zip(got, viewed, strict=True))
    grads = kernels.gather_backward(got, row_of_entry, geom)
    viewed = kernels.gather_backward(QKV(*map(strided, got)), row_of_entry, geom)
    assert all(torch.equal(a, b) for a, b in zip(grads, viewed, strict=True))
