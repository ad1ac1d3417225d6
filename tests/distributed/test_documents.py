"""Packed documents through the whole layer: the oracle's results, and nothing of a neighbour's."""

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import lhcp
from lhcp import reference
from lhcp.comm.layout import LayoutName
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
    num_nodes,
    reference_answer,
    serves,
    together,
    whole_answer,
)
from tests.distributed import test_low_precision as low_precision
from tests.distributed import test_selection as selecting
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
    return size < 20_000 and serves(
        choice["rotation"], choice["world_size"], p.num_kv_heads * p.groups
    )


def cases(seed: int) -> list[Case]:
    chosen = covering(FACTORS, fits, seed)
    return [make(choice, 100 * seed + i) for i, choice in enumerate(chosen)]


CASES = cases(0)
MORE_CASES = cases(1)
MANY_CASES = [case for seed in range(2, 4) for case in cases(seed)]


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


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, id=str(case), marks=pytest.mark.slow) for case in MORE_CASES),
        *(pytest.param(case, id=str(case), marks=pytest.mark.soak) for case in MANY_CASES),
    ],
)
def test_equals_the_reference_at_more_sizes(ranks: RankPool, case: Case) -> None:
    """Fails as above, for other combinations."""
    check(ranks, case)


PROBLEM = Problem(pool_factor=4, num_strata=8, groups=2, packed="random 1", seed=5)


def docs_of(problem: Problem) -> Tensor:
    """The document of each token, [B, N]."""
    assert problem.cu_seqlens is not None
    return documents(problem.cu_seqlens, problem.batch, problem.seqlen)


def tokens_to_change(problem: Problem) -> list[int]:
    """Both ends of a few documents of the first row, and the tokens around where chunks meet."""
    of = docs_of(problem)[0]
    ends = [t for t in range(1, problem.seqlen) if of[t] != of[t - 1]]
    chunk = problem.seqlen // 4
    return sorted({0, *(t - i for t in ends[::9] for i in (0, 1)), chunk - 1, 2 * chunk})


def changes(group: Any, case: Case, own: bool) -> list[list[Tensor]]:
    """For each token that is changed, which of this rank's rows of o, dq, dk and dv move: [N / W].

    The selection is the one of the documents if `own`, else one that knows nothing of them.
    """
    p = case.problem
    q, k, v, do = p.inputs()

    def cut(x: Tensor) -> Tensor:
        return lhcp.shard(x, group, layout=case.layout)

    where: dict[str, Any] = {"config": p.config, "group": group, "layout": case.layout}
    made_for = {"cu_seqlens": p.cu_seqlens} if own else {}
    selection = lhcp.select(cut(q), cut(k), **where, **made_for)

    def answer(*inputs: Tensor) -> list[Tensor]:
        leaves = [cut(x).requires_grad_() for x in inputs]
        o = lhcp.lighthouse_attention(
            *leaves, **where, rotation=case.rotation, selection=selection, cu_seqlens=p.cu_seqlens
        )
        return [o.detach(), *torch.autograd.grad(o, leaves, cut(do))]

    before, found = answer(q, k, v), []
    for token in tokens_to_change(p):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, token] = -3 * x[:, token] + 2
        pairs = zip(before, answer(*changed), strict=True)
        found.append([(x != y).any(3).any(2).any(0) for x, y in pairs])
    return found


WAYS = [(1, "zigzag", "p2p")] + [
    (world, layout, rotation)
    for world, layout in ((2, "zigzag"), (2, "contiguous"), (4, "zigzag"))
    for rotation in ROTATIONS
    if serves(rotation, world, PROBLEM.num_kv_heads * PROBLEM.groups) and rotation != "hierarchical"
]


@pytest.mark.parametrize("own", [True, False], ids=["selected", "given"])
@pytest.mark.parametrize(("world_size", "layout", "rotation"), WAYS)
def test_nothing_leaks(
    ranks: RankPool, world_size: int, layout: LayoutName, rotation: str, own: bool
) -> None:
    """Fails if an output or a gradient of a document moves, by one bit, with another's token."""
    case = Case(problem=PROBLEM, world_size=world_size, layout=layout, rotation=rotation)
    of = docs_of(PROBLEM)[0]
    parts = [changes(None, case, own)]
    if world_size > 1:
        parts = ranks.run(changes, world_size, case, own, num_nodes=num_nodes(case))
    for i, token in enumerate(tokens_to_change(PROBLEM)):
        moved = [together([part[i][j] for part in parts], layout, dim=0) for j in range(4)]
        assert not any(m[of != of[token]].any() for m in moved), token
        # So that the test can fail; a selection that knows no documents may leave one out.
        assert moved[0][of == of[token]].any() or not own


class Packed(Problem):
    """Two documents of half the strata each."""

    @property
    def cu_seqlens(self) -> Tensor:
        half = self.seqlen // 2
        return torch.arange(2 * self.batch + 1, dtype=torch.int32) * half


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_documents_of_whole_strata_are_as_alone(
    ranks: RankPool, world_size: int, layout: LayoutName
) -> None:
    """Fails if a document's result depends on what it is packed with."""
    problem = Packed(num_strata=8, groups=2, seed=3)
    got = whole_answer(ranks, Case(problem=problem, world_size=world_size, layout=layout))
    config, half = problem.config, problem.seqlen // 2
    alone = dataclasses.replace(config, topk=config.topk // 2, num_strata=config.num_strata // 2)
    for part in (slice(0, half), slice(half, None)):
        q, k, v, do = (x[:, part] for x in problem.inputs())
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        o = lhcp.lighthouse_attention(*leaves, config=alone)
        for ours, theirs in zip(got, (o, *torch.autograd.grad(o, leaves, do)), strict=False):
            assert_close_float64("part", ours[:, part], theirs.detach())


class One(Problem):
    """One document a row."""

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.arange(self.batch + 1, dtype=torch.int32) * self.seqlen


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(2, 2), (3, 4), (4, 3)], ids=str)
def test_one_document_has_the_bits_of_none(
    ranks: RankPool, size: tuple[int, int], dtype: torch.dtype
) -> None:
    """Fails if a mean, a score, a choice or a sum is made otherwise where there is one document.

    With two chunks a rank the ring cuts its calls otherwise, so that outputs are merged in another
    order; the local stages are the same.
    """
    sizes: dict[str, Any] = {"num_levels": size[0], "pool_factor": size[1], "dtype": dtype}
    one, none = (kind(groups=2, batch=2, **sizes) for kind in (One, Problem))
    for world_size in (1, 2):
        how: dict[str, Any] = {"world_size": world_size, "layout": "contiguous", "backend": "math"}
        cases = (Case(problem=p, **how) for p in (one, none))
        for ours, theirs in zip(*(whole_answer(ranks, case) for case in cases), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scorer", ["norm", "dilated"])
@pytest.mark.parametrize("dtype", selecting.DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_selection_is_the_same_on_any_number_of_ranks(
    ranks: RankPool, dtype: torch.dtype, scorer: Scorer, layout: LayoutName
) -> None:
    """Fails if a forced window, or what is counted in a score, depends on the sharding."""
    problem = Problem(
        num_strata=24,
        batch=2,
        groups=2,
        head_dim=6,
        picks=4,
        scorer=scorer,
        dtype=dtype,
        packed="of one token",
    )
    selecting.check(ranks, problem, layout, (1, 2, 3, 4))


def test_forced_windows_come_before_infinite_scores(ranks: RankPool) -> None:
    """Fails if NaN, infinity or a tie takes the place of a document's first token."""
    problem = selecting.TiedProblem(num_strata=24, groups=2, picks=4, packed="all that fit")
    selecting.check(ranks, problem, "zigzag", (2, 3))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_within_the_error_budget(ranks: RankPool, dtype: torch.dtype, world_size: int) -> None:
    """Fails if a sum over part of a window is kept in low precision, or rounded twice."""
    problem = dataclasses.replace(low_precision.problem(dtype), packed="random 2")
    low_precision.check(ranks, Case(problem=problem, world_size=world_size))


def kernels_answer(group: Any, kernels: str) -> list[Tensor]:
    """This rank's selection, output and gradients by one set of kernels."""
    p = Problem(num_strata=4, num_kv_heads=1, dtype=torch.float32, packed="of one token")
    q, k, v, do = (lhcp.shard(x, group) for x in p.inputs())
    leaves = [x.requires_grad_() for x in (q, k, v)]
    how: dict[str, Any] = {"config": p.config, "group": group, "kernels": kernels}
    how["cu_seqlens"] = p.cu_seqlens
    o = lhcp.lighthouse_attention(*leaves, **how)
    grads = torch.autograd.grad(o, leaves, do)
    return [*lhcp.select(q, k, **how), o.detach(), *grads]


def test_both_sets_of_kernels_agree(ranks: RankPool) -> None:
    """Fails if Triton's stages, or what they do at the ends of chunks, differ from torch's."""
    pytest.importorskip("triton")
    for ours, theirs in zip(
        *(ranks.run(kernels_answer, 2, name) for name in ("triton", "torch")), strict=True
    ):
        for x, y in zip(ours[:2], theirs[:2], strict=True):
            assert torch.equal(x, y)
        for x, y in zip(ours[2:], theirs[2:], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def other_documents(group: Any, what: str) -> str:
    """Call a layer with documents that rank 1 has otherwise; return what it is told."""
    config, seqlen = small_config(num_strata=8)
    q, k, v, _ = (lhcp.shard(x, group) for x in qkv(seqlen, num_kv_heads=2))
    given: Tensor | None = torch.tensor([0, 9, seqlen], dtype=torch.int32)
    if group.rank() == 1:
        given = {
            "others": torch.tensor([0, 8, seqlen], dtype=torch.int32),
            "none": None,
            "too many": torch.arange(0, seqlen + 1, 2, dtype=torch.int32),
            "floats": torch.tensor([0.0, 9, seqlen]),
        }[what]
    layer = lhcp.LighthouseAttention(config, group)
    try:
        layer(q, k, v, cu_seqlens=given)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("others", "different things: cu_seqlens: '?2 documents"),
        ("none", "ranks were asked for different things"),
        ("too many", "merge short documents"),
        ("floats", "must be torch.int32"),
    ],
)
def test_ranks_are_told_of_other_documents(ranks: RankPool, what: str, message: str) -> None:
    """Fails, by hanging, if a rank goes on to send to one that has raised."""
    for told in ranks.run(other_documents, 2, what):
        assert re.search(message, told), told


def one_more_than_fits(group: Any) -> str:
    config, seqlen = small_config(num_strata=8)
    first = 6 * seqlen // 8
    starts = [0, *(first + 2 * i for i in range(config.picks + 1)), seqlen]
    q, k, v, _ = (lhcp.shard(x, group) for x in qkv(seqlen, num_kv_heads=2))
    cu_seqlens, told = torch.tensor(starts, dtype=torch.int32), []
    calls = (
        lambda: lhcp.select(q, k, config=config, group=group, cu_seqlens=cu_seqlens),
        lambda: lhcp.lighthouse_attention(
            q, k, v, config=config, group=group, cu_seqlens=cu_seqlens
        ),
        lambda: lhcp.LighthouseAttention(config, group)(q, k, v, cu_seqlens=cu_seqlens),
    )
    for call in calls:
        try:
            call()
        except ValueError as error:
            told.append(str(error))
    assert len(told) == 3 and len(set(told)) == 1
    return told[0]


def test_one_document_more_than_fits_is_an_error_on_every_rank(ranks: RankPool) -> None:
    """Fails if only the rank that holds the stratum finds it."""
    told = ranks.run(one_more_than_fits, 4)
    assert len(set(told)) == 1 and "3 windows of level 1" in told[0] and "stratum 6" in told[0]


def documents_of_each_step(group: Any) -> list[float]:
    """The largest errors of a layer that is given other documents at each step, and in place."""
    config, seqlen = small_config(num_strata=8)
    layer = lhcp.LighthouseAttention(config, group)
    errors, given = [], torch.tensor([0, 1, seqlen], dtype=torch.int32)
    for step in range(4):
        q, k, v, _ = qkv(seqlen, num_kv_heads=2, seed=step)
        if step == 2:
            given = torch.tensor([0, 7, seqlen // 2, seqlen], dtype=torch.int32)
        given[1] += 3 * step
        ours = layer(*(lhcp.shard(x, group) for x in (q, k, v)), cu_seqlens=given)
        theirs = reference.lighthouse_attention(q, k, v, config=config, cu_seqlens=given)
        errors.append(float((ours - lhcp.shard(theirs, group)).abs().max()))
    return errors


def test_documents_change_from_step_to_step(ranks: RankPool) -> None:
    """Fails if a step attends to the last one's documents."""
    for errors in (documents_of_each_step(None), *ranks.run(documents_of_each_step, 2)):
        assert max(errors) < 1e-12
