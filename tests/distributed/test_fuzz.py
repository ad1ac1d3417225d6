"""Random cases, another set in each tier: the numbers are in what a failure says."""

import pytest

from lhcp.testing.ranks import RankPool
from tests.distributed.fuzz import checked, draw

TIERS = [
    pytest.param(range(120), id="0-119"),
    pytest.param(range(1000, 1200), id="1000-1199", marks=pytest.mark.slow),
    *(
        pytest.param(range(first, first + 500), id=f"{first}-{first + 499}", marks=pytest.mark.soak)
        for first in range(10_000, 15_000, 500)
    ),
]


@pytest.mark.parametrize("seeds", TIERS)
def test_random_cases_equal_the_reference(ranks: RankPool, seeds: range) -> None:
    """Fails if what a caller may choose, in some combination, gives another result."""
    wrong = [said for _, said in checked(ranks, seeds) if said]
    assert wrong == []


def test_cases_are_drawn_from_their_numbers_and_of_every_kind() -> None:
    """Fails if a number's case cannot be had again, or the draws leave out what they name."""
    cases = [draw(seed) for seed in range(300)]
    assert cases[:20] == [draw(seed) for seed in range(20)]
    for values in (
        {c.case.world_size for c in cases} >= {1, 2, 3, 4},
        {c.case.rotation for c in cases} >= {"p2p", "allgather", "hierarchical", "alltoall"},
        {c.dense for c in cases} == {c.layer for c in cases} == {c.recompute for c in cases},
        len({c.case.problem.dtype for c in cases}) == 4,
        len({stride for c in cases for stride in c.strides}) == 3,
        {c.dense for c in cases if c.cu_seqlens is not None} == {True, False},
        {c.cu_seqlens is None for c in cases} == {True, False},
    ):
        assert values
