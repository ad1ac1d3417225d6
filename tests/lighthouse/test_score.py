"""Scores have the same bits however the tokens lie in memory, in a batch or on ranks."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lhcp
from lhcp import LighthouseConfig, reference
from lhcp.config import SCORER_NAMES
from lhcp.lighthouse.geometry import Geometry
from lhcp.lighthouse.kernel_set import QKV
from lhcp.lighthouse.norms import level_scores, squared_norm, token_scores
from lhcp.lighthouse.score import SCORERS, ScoreInputs, dilated_scores
from lhcp.testing.inputs import qkv
from tests.cases import heads_first, strided

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("head_dim", [1, 3, 8, 13, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_one_order_of_addition(head_dim: int, dtype: torch.dtype) -> None:
    """Fails if the reduction's order depends on the batch, the strides or the length."""
    x = qkv(37, batch=3, num_heads=2, head_dim=head_dim, dtype=dtype, seed=head_dim)[0]
    expected = squared_norm(x)
    assert expected.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(squared_norm(strided(x)), expected)
    assert torch.equal(squared_norm(heads_first(x)), expected)
    assert torch.equal(squared_norm(x.mT.contiguous().mT), expected)
    for row in range(3):
        for token in (0, 17, 36):
            assert torch.equal(squared_norm(x[row, token]), expected[row, token])


@pytest.mark.parametrize("head_dim", [1, 5, 16])
def test_is_the_squared_norm(head_dim: int) -> None:
    """Fails if an element is left out of the pairwise sum or counted twice."""
    x = qkv(11, head_dim=head_dim, seed=3)[0]
    assert torch.allclose(squared_norm(x), (x**2).sum(-1), rtol=1e-14, atol=0)


def test_nan_and_overflow_score_as_infinity() -> None:
    """Fails if NaN, an infinity or an overflow of the square scores as anything but +inf."""
    x = torch.ones(1, 5, 1, 3)
    x[0, 1, 0, 2], x[0, 2, 0, 0], x[0, 3, 0, 1] = torch.nan, -torch.inf, 1e38
    x[0, 4, 0] = torch.tensor([torch.inf, torch.nan, 0])
    assert squared_norm(x)[0, :, 0].tolist() == [3, *[torch.inf] * 4]


def test_a_group_scores_by_its_loudest_head() -> None:
    """Fails if heads go to the wrong kv head, or a group's score is another than its maximum."""
    q = torch.arange(1.0, 9).view(1, 1, 8, 1)
    assert token_scores(q, 4)[0, :, 0].tolist() == [4, 16, 36, 64]
    assert token_scores(q, 1)[0, :, 0].tolist() == [64]


def test_levels_take_the_maximum() -> None:
    """Fails if a level's score is a mean, or a window is off by one."""
    geom = Geometry(
        num_tokens=8,
        num_strata=1,
        num_chunks=1,
        num_levels=3,
        pool_factor=2,
        picks=2,
        has_first=True,
    )
    scores = torch.tensor([[[3.0, 1, 4, 1, 5, 9, 2, 6]]])
    assert level_scores(scores, geom)[0, 0].tolist() == [3, 4, 9, 6, 4, 9]


def test_the_table_has_every_name_of_the_config() -> None:
    """Fails if a config could name a scorer that nobody wrote, or the other way round."""
    assert tuple(SCORERS) == SCORER_NAMES


def test_an_unknown_scorer_is_nobody() -> None:
    """Fails if the oracle takes a name that it does not know for the norm."""
    config = LighthouseConfig(num_levels=3, pool_factor=2, topk=8, num_strata=2)
    object.__setattr__(config, "scorer", "loudest")
    q, k, v, _ = qkv(32)
    with pytest.raises(ValueError, match="loudest"):
        reference.token_scores(q, k, v, config)
    with pytest.raises(KeyError, match="loudest"):
        lhcp.select(q, k, config=config)


def scores_of(
    scorer: str, q: Tensor, k: Tensor, v: Tensor, config: LighthouseConfig, geom: Geometry
) -> tuple[Tensor, Tensor]:
    """Scores of all levels but the tokens'."""
    return SCORERS[scorer].score(QKV(q, k, v), ScoreInputs(geom, config, "torch", 0.5))


@pytest.mark.parametrize("change", [strided, heads_first], ids=["strided", "heads_first"])
@pytest.mark.parametrize("scorer", SCORER_NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_strides_and_batch_do_not_count(
    scorer: str, dtype: torch.dtype, change: Callable[[Tensor], Tensor]
) -> None:
    """Fails if a scorer's bits depend on how its inputs lie in memory or who else is there."""
    config = LighthouseConfig(
        num_levels=3, pool_factor=2, topk=8, num_strata=2, scorer_window=16, dilation=2
    )
    q, k, v, _ = qkv(128, batch=3, num_heads=4, num_kv_heads=2, head_dim=16, dtype=dtype, seed=5)
    geom = Geometry.local(config, 128, 1, 1, 0)
    expected = scores_of(scorer, q, k, v, config, geom)
    changed = scores_of(scorer, change(q), change(k), change(v), config, geom)
    alone = scores_of(scorer, q[1:2], k[1:2], v[1:2], config, geom)
    for one, two, three in zip(expected, changed, alone, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one[1:2], three)


@pytest.mark.parametrize("window", [8, 32, 8192], ids=["small", "stratum", "larger"])
@pytest.mark.parametrize("groups", [1, 2], ids=["G1", "G2"])
def test_dilated_equals_the_reference(window: int, groups: int) -> None:
    """Fails if blocks, residues, roles (q, k, v) and (k, q, v) or the scale are mixed up."""
    config = LighthouseConfig(
        num_levels=3,
        pool_factor=2,
        topk=8,
        num_strata=2,
        scorer="dilated",
        scorer_window=window,
        dilation=4,
    )
    q, k, v, _ = qkv(64, batch=2, num_heads=2 * groups, num_kv_heads=2, head_dim=6, seed=7)
    geom = Geometry.local(config, 64, 1, 1, 0)
    expected = reference.token_scores(q, k, v, config, 0.9)
    got = dilated_scores(QKV(q, k, v), ScoreInputs(geom, config, "torch", 0.9))
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14)
