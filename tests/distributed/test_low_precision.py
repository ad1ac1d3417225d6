"""bf16, fp16 and fp32 within the error budget that plain torch sets, the selection held fixed."""

import pytest
import torch

from lhcp import reference
from lhcp.comm.layout import LayoutName
from lhcp.testing.ranks import RankPool
from lhcp.testing.tolerance import assert_within_budget
from tests.cases import (
    LAYOUTS,
    ROTATIONS,
    Case,
    Problem,
    dense_reference,
    reference_answer,
    reference_selection,
    serves,
    whole_answer,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check(pool: RankPool, case: Case) -> None:
    """Check o, dq, dk and dv of a case; all three have one selection."""
    exact = reference_answer(case.problem, torch.float64)
    same_dtype = reference_answer(case.problem)
    got = whole_answer(pool, case)
    assert torch.equal(got.levels, exact.levels) and torch.equal(got.indices, exact.indices)
    lse_error = 0.0 if case.world_size == 1 else rounding_of_lse(case.problem)
    for name in ("o", "dq", "dk", "dv"):
        ours, theirs, truth = (getattr(x, name) for x in (got, same_dtype, exact))
        assert ours.dtype == case.problem.dtype
        assert_within_budget(name, ours, theirs, truth, lse_error * truth.abs().max().item())


def rounding_of_lse(problem: Problem) -> float:
    """Error of a float32 lse of the sub-sequence: relative, of each part that is merged by it."""
    q, k, v, _ = (x.double() for x in problem.inputs())
    selection = reference_selection(problem)
    sub = (reference.gather(x, selection, problem.config) for x in (q, k, v))
    _, lse = dense_reference(*sub, causal=True)
    return torch.finfo(torch.float32).eps * lse.abs().max().item()


def problem(dtype: torch.dtype, seed: int = 0) -> Problem:
    return Problem(
        num_levels=3, pool_factor=4, num_kv_heads=4, groups=2, head_dim=16, dtype=dtype, seed=seed
    )


WAYS = [(1, ROTATIONS[0])] + [(world, rotation) for world in (2, 4) for rotation in ROTATIONS]


@pytest.mark.parametrize(("world_size", "rotation"), WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_within_budget(ranks: RankPool, dtype: torch.dtype, world_size: int, rotation: str) -> None:
    """Fails if a sum over steps, ranks, levels or windows is kept in low precision."""
    assert serves(rotation, world_size, 4)
    layout: LayoutName = LAYOUTS[(world_size // 2 + ROTATIONS.index(rotation)) % 2]
    check(
        ranks, Case(problem=problem(dtype), world_size=world_size, layout=layout, rotation=rotation)
    )


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(1, marks=pytest.mark.slow),
        *(pytest.param(seed, marks=pytest.mark.soak) for seed in (2, 3)),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_within_budget_at_both_layouts(
    ranks: RankPool, dtype: torch.dtype, rotation: str, layout: LayoutName, seed: int
) -> None:
    """Fails as above, over fresh inputs."""
    check(
        ranks,
        Case(problem=problem(dtype, seed), world_size=4, layout=layout, rotation=rotation),
    )
