"""Packed documents through the whole layer: the oracle's results, and nothing of a neighbour's."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import lhcp
from lhcp import reference
from lhcp.comm.layout import LayoutName
from lhcp.comm.mesh import as_ranks
from lhcp.config import Scorer
from lhcp.reference_documents import documents
from lhcp.testing.inputs import qkv, small_config
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
    together,
    whole_answer,
)
from tests.documents import KINDS

FACTORS: dict[str, tuple[Any, ...]] = {
    "world_size": (1, 2, 3, 4),
    "layout": LAYOUTS,
    "rotation": ROTATIONS,
    "groups": (1, 2, 3),
    "num_kv_heads": (1, 2, 3, 4),
    "num_levels": (2, 3, 4),
    "pool_factor": (2, 3, 4),
    "batch": (1, 3),
    "picks": (2, 4),
    "strata_per_chunk": (1, 2),
    "scorer": ("norm", "dilated"),
    "scored": (False, True),
    "packed": KINDS,
}


def make(choice: dict[str, Any], seed: int = 0) -> Case:
    choice = dict(choice)
    world_size, layout = choice.pop("world_size"), choice.pop("layout")
    rotation = choice.pop("rotation")
    chunks = max(2, world_size * (2 if layout == "zigzag" else 1))
    strata = choice.pop("strata_per_chunk") * chunks
    problem = Problem(**choice, num_strata=strata, head_dim=5, seed=seed)
    return Case(problem=problem, world_size=world_size, layout=layout, rotation=rotation)


def fits(choice: dict[str, Any]) -> bool:
    """Whether the choice can be done at all, and in no time."""
    p = make(choice).problem
    size = p.seqlen * p.batch * p.num_kv_heads * p.groups
    return size < 20_000 and serves(choice["rotation"], choice["world_size"], p.num_kv_heads)


def cases(seed: int) -> list[Case]:
    chosen = covering(FACTORS, fits, seed)
    return [make(choice, 100 * seed + i) for i, choice in enumerate(chosen)]


CASES = cases(0)
MORE_CASES = [case for seed in range(1, 4) for case in cases(seed)]


def check(pool: Any, case: Case) -> None:
    """Compare output, gradients and selection of a case with the reference's."""
    expected, got = reference_answer(case.problem), whole_answer(pool, case)
    assert torch.equal(got.levels, expected.levels)
    assert torch.equal(got.indices, expected.indices)
    for name in ("o", "dq", "dk", "dv"):
        assert_close_float64(name, getattr(got, name), getattr(expected, name))


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_equals_the_reference(ranks: RankPool, case: Case) -> None:
    """Fails if a mean, a score, a forced window or a served token is of another document."""
    check(ranks, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE_CASES, ids=ids(MORE_CASES))
def test_equals_the_reference_at_more_sizes(ranks: RankPool, case: Case) -> None:
    """Fails as above, for other combinations."""
    check(ranks, case)
