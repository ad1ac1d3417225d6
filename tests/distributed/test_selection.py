"""The selection has the same bits on any number of ranks, and is the reference's."""

from typing import Any

import pytest
import torch

from lhcp.comm.layout import LayoutName
from lhcp.config import Scorer
from lhcp.testing.ranks import RankPool
from tests.cases import (
    LAYOUTS,
    Case,
    Problem,
    decode,
    library_selection,
    rank_and_size,
    reference_selection,
    together,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def decoded_selection(group: Any, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels and whole-sequence indices of this rank's selection."""
    rank, size = rank_and_size(group)
    selection = library_selection(group, case)
    return decode(selection, case.problem.config, case.problem.seqlen, case.layout, size, rank)


def check(
    pool: RankPool, problem: Problem, layout: LayoutName, world_sizes: tuple[int, ...]
) -> None:
    alone = decoded_selection(None, Case(problem=problem))
    if problem.scorer == "norm" or problem.dtype == torch.float64:
        # Elsewhere the reference's attention and a stock kernel's differ by roundings that rank.
        for ours, theirs in zip(alone, reference_selection(problem), strict=True):
            assert torch.equal(ours, theirs)
    for world_size in world_sizes:
        case = Case(problem=problem, world_size=world_size, layout=layout)
        parts = pool.run(decoded_selection, world_size, case)
        for i, theirs in enumerate(alone):
            got = together([part[i] for part in parts], layout, dim=2)
            assert torch.equal(got, theirs), f"W={world_size}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scorer", ["norm", "dilated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_same_on_any_number_of_ranks(
    ranks: RankPool, dtype: torch.dtype, scorer: Scorer, layout: LayoutName
) -> None:
    """Fails if a score's bits, a tie or a stratum's place depends on the sharding."""
    problem = Problem(num_strata=24, batch=2, groups=2, head_dim=6, scorer=scorer, dtype=dtype)
    check(ranks, problem, layout, (1, 2, 3, 4))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ties_are_the_same_on_any_number_of_ranks(ranks: RankPool, layout: LayoutName) -> None:
    """Fails if duplicated tokens, zeros or infinities are ranked by where they lie on a rank."""
    check(ranks, TiedProblem(num_strata=24, groups=2, picks=4), layout, (2, 3, 4))


class TiedProblem(Problem):
    """Tokens of five kinds only: two that repeat, zeros, and rows that overflow to +inf or NaN."""

    def _draw(self, seed: int) -> tuple[torch.Tensor, ...]:
        q, k, v, do = super()._draw(seed)
        kinds = torch.tensor([1.0, 0.0, 2.0, torch.inf, torch.nan], dtype=self.dtype)
        generator = torch.Generator().manual_seed(seed)
        chance = torch.tensor([0.6, 0.2, 0.14, 0.03, 0.03])
        tied = []
        for x in (q, k):
            kind = chance.multinomial(x[..., 0].numel(), replacement=True, generator=generator)
            tied.append(torch.ones_like(x) * kinds[kind].view(*x.shape[:3], 1))
        return tied[0], tied[1], v, do


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scorer", ["norm", "dilated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_same_on_eight_ranks(
    eight_ranks: RankPool, dtype: torch.dtype, scorer: Scorer, layout: LayoutName
) -> None:
    """Fails as above, at more ranks and deeper levels."""
    problem = Problem(
        num_levels=4, num_strata=48, groups=2, head_dim=16, scorer=scorer, dtype=dtype, seed=8
    )
    check(eight_ranks, problem, layout, (3, 6, 8))
