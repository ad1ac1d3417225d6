"""The whole path against the reference in float64, on one rank and on several."""

from typing import Any

import pytest
import torch

from lhcp.testing.ranks import RankPool
from lhcp.testing.tolerance import assert_close_float64
from tests.cases import (
    LAYOUTS,
    ROTATIONS,
    Case,
    Problem,
    covering,
    ids,
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
    return size < 100_000 and serves(choice["rotation"], choice["world_size"], p.num_kv_heads)


CASES = [make(choice, seed) for seed, choice in enumerate(covering(FACTORS, fits))]


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
