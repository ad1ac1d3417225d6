"""The whole path against the reference in float64, on one rank and on several."""

from typing import Any

import pytest
import torch

from lhcp.comm.layout import LayoutName
from lhcp.testing.ranks import RankPool
from lhcp.testing.tolerance import assert_close_float64
from tests.cases import (
    LAYOUTS,
    ROTATIONS,
    Case,
    Problem,
    covering,
    ids,
    library_answer,
    reference_answer,
    serves,
    whole_answer,
)

FACTORS: dict[str, tuple[Any, ...]] = {
    "world_size": (2, 3, 4),
    "layout": LAYOUTS,
    "rotation": ROTATIONS,
    "groups": (1, 2, 4),
    "num_kv_heads": (1, 2, 3, 4),
    "num_levels": (2, 3, 4),
    "pool_factor": (2, 3, 4, 8),
    "batch": (1, 3),
    "head_dim": (4, 5),
    "picks": (2, 4),
    "strata_per_chunk": (1, 2),
    "scorer": ("norm", "dilated"),
    "scale": (None, 0.7),
    "scored": (False, True),
    "fixed": (False, True),
}


def make(choice: dict[str, Any], seed: int = 0) -> Case:
    choice = dict(choice)
    world_size, layout = choice.pop("world_size"), choice.pop("layout")
    rotation = choice.pop("rotation")
    chunks = world_size * (2 if layout == "zigzag" else 1)
    strata = choice.pop("strata_per_chunk") * chunks
    problem = Problem(**choice, num_strata=strata, seed=seed)
    return Case(problem=problem, world_size=world_size, layout=layout, rotation=rotation)


def fits(choice: dict[str, Any]) -> bool:
    """Whether the choice can be done at all, and in no time."""
    p = make(choice).problem
    size = p.seqlen * p.batch * p.num_kv_heads * p.groups
    return size < 100_000 and serves(
        choice["rotation"], choice["world_size"], p.num_kv_heads * p.groups
    )


def cases(factors: dict[str, tuple[Any, ...]], seed: int) -> list[Case]:
    """A covering set of cases, another one for each seed."""
    chosen = covering(factors, fits, seed)
    return [make(choice, 100 * seed + i) for i, choice in enumerate(chosen)]


CASES = cases(FACTORS, 0)
MORE_CASES = cases(FACTORS, 1)
MANY_CASES = [case for seed in range(2, 6) for case in cases(FACTORS, seed)]
EIGHT = FACTORS | {"world_size": (8,), "num_kv_heads": (1, 2, 8), "strata_per_chunk": (1, 3)}
EIGHT_CASES = cases(EIGHT, 0)


def check(pool: Any, case: Case) -> None:
    """Compare output, gradients and selection of a case with the reference's."""
    expected, got = reference_answer(case.problem), whole_answer(pool, case)
    assert torch.equal(got.levels, expected.levels)
    assert torch.equal(got.indices, expected.indices)
    for name in ("o", "dq", "dk", "dv"):
        assert_close_float64(name, getattr(got, name), getattr(expected, name))


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_equals_the_reference(ranks: RankPool, case: Case) -> None:
    """Fails if any step, exchange or gradient differs from the method, on one rank or several."""
    check(None, Case(problem=case.problem))
    check(ranks, case)


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, id=str(case), marks=pytest.mark.slow) for case in MORE_CASES),
        *(pytest.param(case, id=str(case), marks=pytest.mark.soak) for case in MANY_CASES),
    ],
)
def test_equals_the_reference_at_more_sizes(ranks: RankPool, case: Case) -> None:
    """Fails as above, for other combinations."""
    check(None, Case(problem=case.problem))
    check(ranks, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", EIGHT_CASES, ids=ids(EIGHT_CASES))
def test_equals_the_reference_on_eight_ranks(eight_ranks: RankPool, case: Case) -> None:
    """Fails as above, where a rank's neighbours are all different ranks."""
    check(eight_ranks, case)


@pytest.mark.parametrize("backend", ["cpu", "math"])
def test_a_group_of_one_is_no_group(ranks: RankPool, backend: str) -> None:
    """Fails if one rank of a group takes another path than no group."""
    case = Case(problem=Problem(groups=2, batch=2, dtype=torch.float32), backend=backend)
    (in_a_group,) = ranks.run(library_answer, 1, case)
    for ours, theirs in zip(in_a_group, library_answer(None, case), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_block_backend_is_free(ranks: RankPool, layout: LayoutName) -> None:
    """Fails if a result depends on which backend attends, beyond rounding."""
    problem = Problem(groups=2, num_kv_heads=4, seed=9)
    for rotation in ROTATIONS:
        check(
            ranks,
            Case(problem=problem, world_size=4, layout=layout, rotation=rotation, backend="math"),
        )
