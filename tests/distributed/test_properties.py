"""Promises of the function itself: causal for a fixed selection, every token covered, NaN kept."""

from typing import Any

import pytest
import torch
from torch import Tensor

import lhcp
from lhcp import reference
from lhcp.comm.layout import LayoutName
from lhcp.testing.ranks import RankPool
from tests.cases import (
    LAYOUTS,
    Case,
    Problem,
    heads_first,
    library_answer,
    library_selection,
    reference_selection,
    strided,
    together,
)

PROBLEM = Problem(num_levels=3, pool_factor=4, num_strata=8, groups=2, batch=1, seed=5)
CHUNK = PROBLEM.seqlen // 4
TOKENS = (0, 1, CHUNK - 1, CHUNK, 2 * CHUNK - 1, 2 * CHUNK, 3 * CHUNK + 7, PROBLEM.seqlen - 1)
"""Tokens to change: both ends, and both sides of where chunks meet at W = 2."""


def attend(group: Any, layout: LayoutName, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
    """This rank's output for whole inputs."""
    parts = (lhcp.shard(x, group, layout=layout) for x in (q, k, v))
    return lhcp.lighthouse_attention(
        *parts, config=PROBLEM.config, group=group, layout=layout, **more
    )


def first_changes(group: Any, layout: LayoutName) -> list[int]:
    """For each token that is changed, the first of this rank's positions whose output changes."""
    q, k, v, _ = PROBLEM.inputs()
    selection = library_selection(group, Case(problem=PROBLEM, layout=layout))
    before = attend(group, layout, q, k, v, selection=selection)
    where = lhcp.positions(PROBLEM.seqlen, group, layout=layout)
    first = []
    for token in TOKENS:
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, token] = -3 * x[:, token] + 2
        after = attend(group, layout, *changed, selection=selection)
        differs = where[(before != after).any(3).any(2).any(0)]
        first.append(int(differs.min()) if len(differs) else PROBLEM.seqlen)
    return first


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_causal_for_a_fixed_selection(ranks: RankPool, layout: LayoutName, world_size: int) -> None:
    """Fails if any path lets an output see a later token, by one bit."""
    firsts = ranks.run(first_changes, world_size, layout)
    first_anywhere = [min(rank) for rank in zip(*firsts, strict=True)]
    for token, first in zip(TOKENS, first_anywhere, strict=True):
        assert first >= token
        # The change is seen at the end of the coarsest window at the latest.
        assert first < (token // 16 + 1) * 16


def test_the_selection_itself_looks_ahead() -> None:
    """Fails if the docs no longer need to say that selection is not causal inside a stratum."""
    q, k, v, _ = PROBLEM.inputs()
    before = attend(None, "zigzag", q, k, v)
    loud = k.clone()
    end = PROBLEM.seqlen // PROBLEM.num_strata
    loud[:, end - 1] *= 100
    after = attend(None, "zigzag", q, loud, v)
    first = int((before != after).any(3).any(2).any(0).nonzero()[0])
    assert first < end - 16


def fan_in(group: Any, layout: LayoutName) -> Tensor:
    """How many entries each of this rank's positions sums: attention to ones is one."""
    q, k, v, _ = PROBLEM.inputs()
    return attend(group, layout, q, k, torch.ones_like(v))


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_position_sums_one_to_all_levels(
    ranks: RankPool, layout: LayoutName, world_size: int
) -> None:
    """Fails if a position is left empty, or an entry serves others than the method says."""
    counted = together(ranks.run(fan_in, world_size, layout), layout)
    levels, indices = reference_selection(PROBLEM)
    expected = torch.zeros(1, PROBLEM.seqlen, PROBLEM.num_kv_heads, dtype=torch.float64)
    for head in range(PROBLEM.num_kv_heads):
        for level, index in zip(levels[0, head].tolist(), indices[0, head].tolist(), strict=True):
            window = PROBLEM.pool_factor**level
            expected[0, index * window + window - 1 : index * window + 2 * window - 1, head] += 1
    by_query_head = expected.repeat_interleave(PROBLEM.groups, 2)[..., None].expand_as(counted)
    torch.testing.assert_close(counted, by_query_head, rtol=1e-12, atol=1e-12)
    assert expected.min() >= 1 and expected.max() <= PROBLEM.num_levels


def from_views(group: Any, case: Case) -> bool:
    """Whether inputs and gradients that are views give this rank the same bits."""
    q, k, v, do = (lhcp.shard(x, group, layout=case.layout) for x in case.problem.inputs())
    score_q, score_k = q * 2, k + 1
    results = []
    for change in (torch.clone, strided, heads_first):
        leaves = [change(x).requires_grad_() for x in (q, k, v)]
        o = lhcp.lighthouse_attention(
            *leaves,
            config=case.problem.config,
            group=group,
            layout=case.layout,
            score_q=change(score_q),
            score_k=change(score_k),
        )
        results.append([o, *torch.autograd.grad(o, leaves, change(do))])
    return all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*results, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_need_not_be_contiguous(ranks: RankPool, layout: LayoutName) -> None:
    """Fails if a stage or a message reads a view as if it were packed."""
    case = Case(problem=Problem(groups=2, batch=3, dtype=torch.float32), layout=layout)
    assert all(ranks.run(from_views, 2, case))


class Spoilt(Problem):
    """Inputs with a bad number in q, in k and in v, in different strata and heads."""

    bad: float = torch.nan

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v, do = super().inputs()
        n = self.seqlen
        q[0, n // 3, 0, 1] = self.bad
        k[0, n // 2 + 1, 1, 0] = self.bad
        v[0, 3 * n // 4, 0, 2] = self.bad
        return q, k, v, do


class Infinite(Spoilt):
    bad = torch.inf


def outputs_that_depend(problem: Spoilt) -> Tensor:
    """Where the reference's output follows the bad numbers: it changes with what they are."""
    selection = reference_selection(problem)
    answers = []
    for bad in (2.0, 3.0):
        q, k, v, _ = (x.nan_to_num(nan=bad) for x in problem.inputs())
        answers.append(
            reference.lighthouse_attention(q, k, v, config=problem.config, selection=selection)
        )
    return answers[0] != answers[1]


@pytest.mark.parametrize("backend", ["cpu", "math"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("kind", [Spoilt, Infinite], ids=["nan", "inf"])
def test_bad_numbers_stay_where_the_reference_has_them(
    ranks: RankPool, kind: type[Spoilt], world_size: int, layout: LayoutName, backend: str
) -> None:
    """Fails if NaN or inf changes an index, spreads further than in the reference, or is lost."""
    problem = kind(groups=2, num_strata=8)
    q, k, v, _ = problem.inputs()
    expected = reference_selection(problem)
    theirs = reference.lighthouse_attention(q, k, v, config=problem.config)
    parts = ranks.run(
        library_answer, world_size, Case(problem=problem, layout=layout, backend=backend)
    )
    for i, selected in ((4, expected.levels), (5, expected.indices)):
        assert torch.equal(together([part[i] for part in parts], layout, dim=2), selected)
    ours = together([part[0] for part in parts], layout)
    finite = theirs.isfinite()
    assert finite.any() and not finite.all()
    torch.testing.assert_close(ours[finite], theirs[finite], rtol=1e-10, atol=1e-10)
    if kind is Spoilt:
        # The reference multiplies masked values by zero, so it has NaN in earlier rows as well.
        assert bool(ours[outputs_that_depend(problem)].isnan().all())
