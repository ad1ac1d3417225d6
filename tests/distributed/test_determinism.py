"""The same call twice has the same bits, forward and backward."""

from typing import Any

import pytest
import torch

from lhcp.config import Scorer
from lhcp.testing.ranks import RankPool
from tests.cases import (
    LAYOUTS,
    ROTATIONS,
    TWO_AXES,
    Case,
    Problem,
    library_answer,
    num_nodes,
    serves,
)


def twice(group: Any, case: Case) -> bool:
    """Whether two runs of a case give this rank equal bits."""
    first, second = library_answer(group, case), library_answer(group, case)
    return all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("scorer", ["norm", "dilated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_have_the_same_bits(
    ranks: RankPool, dtype: torch.dtype, scorer: Scorer, rotation: str
) -> None:
    """Fails if a sum's order follows the arrival of messages, or an allocator's memory is read."""
    problem = Problem(
        num_strata=12, num_kv_heads=3, groups=2, batch=2, scorer=scorer, dtype=dtype, seed=1
    )
    assert serves(rotation, 3, 3)
    for layout in LAYOUTS:
        case = Case(problem=problem, world_size=3, layout=layout, rotation=rotation)
        assert ranks.run(twice, 3, case, num_nodes=num_nodes(case)) == [True] * 3
    assert twice(None, Case(problem=problem))


def deterministic(group: Any, case: Case) -> bool:
    """`twice`, in torch's deterministic mode, in which an operator that is not one raises."""
    torch.use_deterministic_algorithms(True)
    try:
        return twice(group, case)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_nothing_refuses_the_deterministic_mode(ranks: RankPool, rotation: str) -> None:
    """Fails if a stage uses an operator that torch calls nondeterministic."""
    problem = Problem(num_kv_heads=2, groups=2, dtype=torch.float32)
    case = Case(problem=problem, world_size=2, rotation=rotation)
    assert rotation in TWO_AXES or num_nodes(case) is None
    assert ranks.run(deterministic, 2, case, num_nodes=num_nodes(case)) == [True] * 2
    assert deterministic(None, Case(problem=problem))
