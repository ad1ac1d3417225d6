"""Pooling and scoring against float64, and the scores' independence of how tokens are held."""

import dataclasses

import pytest
import torch

from lhcp.lighthouse import norms
from lhcp.lighthouse import pool as torch_pool
from lhcp.lighthouse.kernel_set import QKV
from lhcp.lighthouse.kernels import pool as kernels
from tests.kernels.cases import CASES, assert_close, strided


def exact_scores(case, q, k):
    return [
        norms.level_scores(norms.token_scores(x.double(), case.num_kv_heads), case.geom)
        for x in (q, k)
    ]


def flat(pooled):
    return (*pooled.means, pooled.sq, pooled.sk)


@pytest.mark.parametrize("name", CASES)
def test_means_and_scores(name):
    case = CASES[name]
    tokens = q, k, _ = case.qkv(case.geom.num_tokens)
    means, sq, sk = kernels.pool_and_score(tokens, case.geom)
    for x, mean in zip(tokens, means, strict=True):
        assert mean.dtype == case.dtype
        assert_close(mean, torch_pool.pool(x.double(), case.geom), case.dtype)
    for got, exact in zip((sq, sk), exact_scores(case, q, k), strict=True):
        assert_close(got, exact, torch.float32)


def test_scores_of_other_tensors_are_the_same_scores():
    case = CASES["two_chunks"]
    tokens = q, k, _ = case.qkv(case.geom.num_tokens)
    _, sq, sk = kernels.pool_and_score(tokens, case.geom)
    scored = kernels.score_tensors(q, k, case.geom)
    assert torch.equal(sq, scored[0]) and torch.equal(sk, scored[1])
    other = dataclasses.replace(case, head_dim=24)
    q, k, _ = other.qkv(other.geom.num_tokens)
    for got, exact in zip(
        kernels.score_tensors(q, k, other.geom), exact_scores(other, q, k), strict=True
    ):
        assert_close(got, exact, torch.float32)


def test_without_scores():
    case = CASES["p3"]
    tokens = case.qkv(case.geom.num_tokens)
    means, sq, sk = kernels.pool_and_score(tokens, case.geom, with_scores=False)
    assert sq.shape == sk.shape == (0,)
    want, _, _ = kernels.pool_and_score(tokens, case.geom)
    assert all(torch.equal(a, b) for a, b in zip(means, want, strict=True))


@pytest.mark.parametrize("name", ["p4", "fp32"])
def test_same_bits_for_any_shard_and_strides(name):
    case = CASES[name]
    tokens = case.qkv(case.geom.num_tokens)
    whole = flat(kernels.pool_and_score(tokens, case.geom))
    viewed = flat(kernels.pool_and_score(QKV(*map(strided, tokens)), case.geom))
    assert all(torch.equal(a, b) for a, b in zip(whole, viewed, strict=True))

    half = dataclasses.replace(case, num_strata=case.num_strata // 2, batch=1).geom
    part = QKV(*(x[:1, half.num_tokens :] for x in tokens))
    sharded = flat(kernels.pool_and_score(part, half))
    for level in range(1, half.num_levels):
        here = slice(*(half.offset(i) - half.num_tokens for i in (level, level + 1)))
        start = case.geom.offset(level) - case.geom.num_tokens + half.level_size(level)
        there = slice(start, start + half.level_size(level))
        for a, b in zip(sharded[:3], whole[:3], strict=True):
            assert torch.equal(a[:, here], b[:1, there])
        for a, b in zip(sharded[3:], whole[3:], strict=True):
            assert torch.equal(a[..., here], b[:1, :, there])


def test_nan_scores_as_infinite():
    case = CASES["p3"]
    tokens = q, k, _ = case.qkv(case.geom.num_tokens)
    q[0, 5, 2, 3] = torch.nan
    k[0, 9, 0, 0] = torch.inf
    _, sq, sk = kernels.pool_and_score(tokens, case.geom)
    assert not sq.isnan().any() and not sk.isnan().any()
    assert sq[0, 1, 1] == torch.inf and sq.isinf().sum() == case.geom.num_levels - 1
    assert sk[0, 0, 3] == torch.inf and sk.isinf().sum() == case.geom.num_levels - 1
