"""The gather, exact, and its gradient against the torch path in float64."""

import pytest
import torch

from lhcp.lighthouse import gather as torch_path
from lhcp.lighthouse.kernels import gather as kernels
from tests.kernels.cases import CASES, assert_close, strided


@pytest.mark.parametrize("name", CASES)
def test_gather_equals_torch_path(name):
    case = CASES[name]
    geom = case.geom
    entries, _ = case.selection()
    tokens, pooled = case.qkv(geom.num_tokens), case.qkv(geom.pooled_size)
    views = [strided(x) for x in (*tokens, *pooled)]
    for inputs in ((*tokens, *pooled), views):
        got = kernels.gather(*inputs, entries, geom)
        for x, p, g in zip(tokens, pooled, got, strict=True):
            assert torch.equal(g, torch_path.gather_one(x, p, entries))


@pytest.mark.parametrize("name", CASES)
def test_gradient(name):
    case = CASES[name]
    geom = case.geom
    _, places = case.selection()
    grads = case.qkv(geom.subsequence)
    got = kernels.gather_backward(*grads, places, geom)
    for dsub, dx in zip(grads, got, strict=True):
        assert dx.dtype == case.dtype
        assert_close(dx, torch_path.gather_backward_one(dsub.double(), places, geom), case.dtype)
    viewed = kernels.gather_backward(*(strided(x) for x in grads), places, geom)
    assert all(torch.equal(a, b) for a, b in zip(got, viewed, strict=True))
