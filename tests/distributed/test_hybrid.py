"""Heads over some ranks, the sequence over the others: kv heads on several ranks, more meshes."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import lhcp
from lhcp.comm.layout import LayoutName
from lhcp.ring.heads import TWO_AXES
from lhcp.ring.rotation.alltoall import sum_copies
from lhcp.testing.inputs import qkv
from lhcp.testing.ranks import RankPool
from lhcp.testing.tolerance import assert_close_float64
from tests.cases import (
    LAYOUTS,
    Answer,
    Case,
    Problem,
    dense_reference,
    library_answer,
    reference_answer,
    together,
)

HYBRIDS = ("hybrid", "hybrid_context_first")


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """A mesh of two axes, and heads for it."""

    nodes: int
    inner: int
    num_kv_heads: int
    groups: int

    @property
    def world(self) -> int:
        return self.nodes * self.inner

    def __str__(self) -> str:
        heads = f"H{self.num_kv_heads * self.groups}of{self.num_kv_heads}"
        return f"{self.nodes}x{self.inner}-{heads}"


# A kv head a rank; one on all; two on two ranks each; and one and a half groups a rank.
ON_FOUR = [
    Mesh(nodes=2, inner=2, num_kv_heads=2, groups=1),
    Mesh(nodes=2, inner=2, num_kv_heads=1, groups=4),
    Mesh(nodes=2, inner=2, num_kv_heads=3, groups=2),
    Mesh(nodes=1, inner=4, num_kv_heads=2, groups=2),
    Mesh(nodes=4, inner=1, num_kv_heads=2, groups=2),
]
ON_MORE = [
    Mesh(nodes=2, inner=3, num_kv_heads=2, groups=3),
    Mesh(nodes=3, inner=2, num_kv_heads=3, groups=2),
    Mesh(nodes=2, inner=4, num_kv_heads=2, groups=4),
    Mesh(nodes=4, inner=2, num_kv_heads=4, groups=1),
    Mesh(nodes=4, inner=2, num_kv_heads=1, groups=8),
    Mesh(nodes=2, inner=4, num_kv_heads=8, groups=1),
]


def problem_of(mesh: Mesh) -> Problem:
    return Problem(
        num_strata=2 * mesh.world, num_kv_heads=mesh.num_kv_heads, groups=mesh.groups, batch=2
    )


def lighthouse(pool: RankPool, mesh: Mesh, layout: LayoutName, rotation: str) -> None:
    """Compare with the reference, selection and all."""
    problem = problem_of(mesh)
    case = Case(problem=problem, world_size=mesh.world, layout=layout, rotation=rotation)
    parts = pool.run(library_answer, mesh.world, case, num_nodes=mesh.nodes)
    expected = reference_answer(problem)
    for i, name in enumerate(Answer._fields):
        got = together([part[i] for part in parts], layout, dim=2 if i >= 4 else 1)
        if i >= 4:
            assert torch.equal(got, expected[i])
        else:
            assert_close_float64(name, got, expected[i])


def dense_inputs(mesh: Mesh) -> Any:
    heads = (mesh.num_kv_heads * mesh.groups, mesh.num_kv_heads)
    sizes = {"batch": 2, "num_heads": heads[0], "num_kv_heads": heads[1], "head_dim": 8}
    return qkv(6 * mesh.world, dtype=torch.float64, seed=mesh.world, **sizes)


def dense_part(
    group: Any, mesh: Mesh, layout: LayoutName, rotation: str, causal: bool
) -> tuple[torch.Tensor, ...]:
    q, k, v, do = (lhcp.shard(x, group, layout=layout) for x in dense_inputs(mesh))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o, lse = lhcp.ring_attention(
        *leaves, group=group, layout=layout, rotation=rotation, causal=causal, return_lse=True
    )
    return o.detach(), *torch.autograd.grad(o, leaves, do), lse


def dense(pool: RankPool, mesh: Mesh, layout: LayoutName, rotation: str, causal: bool) -> None:
    """Compare with attention over the whole sequence, lse and all."""
    arguments = (mesh, layout, rotation, causal)
    parts = pool.run(dense_part, mesh.world, *arguments, num_nodes=mesh.nodes)
    q, k, v, do = dense_inputs(mesh)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o, lse = dense_reference(*leaves, causal)
    expected = (o.detach(), *torch.autograd.grad(o, leaves, do), lse.detach())
    for i, name in enumerate(("o", "dq", "dk", "dv", "lse")):
        got = together([part[i] for part in parts], layout, dim=2 if i == 4 else 1)
        assert_close_float64(name, got, expected[i])


@pytest.mark.parametrize("rotation", HYBRIDS)
@pytest.mark.parametrize("mesh", ON_FOUR, ids=str)
def test_equals_one_rank(ranks: RankPool, mesh: Mesh, rotation: str) -> None:
    """Fails if a kv head's gradients of some ranks are lost, or meets others' queries."""
    for i, layout in enumerate(LAYOUTS):
        lighthouse(ranks, mesh, layout, rotation)
        dense(ranks, mesh, layout, rotation, causal=i == 0)


@pytest.mark.slow
@pytest.mark.parametrize("rotation", TWO_AXES)
@pytest.mark.parametrize("mesh", ON_MORE, ids=str)
def test_equals_one_rank_on_more(eight_ranks: RankPool, mesh: Mesh, rotation: str) -> None:
    """Fails as above, where both axes have several ranks and differ."""
    for layout in LAYOUTS:
        lighthouse(eight_ranks, mesh, layout, rotation)
        for causal in (True, False):
            dense(eight_ranks, mesh, layout, rotation, causal)


def test_gradients_of_a_shared_kv_head_are_summed_wide() -> None:
    """Fails if parts of several ranks are added up in bf16: 256 + 1 + 1 + 1 would stay 256."""
    parts = torch.tensor([256.0, 1, 1, 1, 0, 0, 0, 3], dtype=torch.bfloat16)
    total = sum_copies(parts.view(1, 1, 8, 1), 4)
    assert total.dtype == torch.bfloat16 and total.flatten().tolist() == [260.0, 3.0]


def asks_for_lse(group: Any, where: tuple[int, ...]) -> str:
    q = torch.zeros(1, 8, 4, 8)
    asked = group.rank() in where
    try:
        lhcp.ring_attention(q, q, q, group=group, rotation="alltoall", return_lse=asked)
    except ValueError as error:
        return str(error)
    return "nothing said"


def test_ranks_agree_whether_lse_is_sent(ranks: RankPool) -> None:
    """Fails if one rank sends an lse that the others do not expect."""
    for told in ranks.run(asks_for_lse, 2, (1,)):
        assert "lse: False on rank 0, True on rank 1" in told
    assert ranks.run(asks_for_lse, 2, (0, 1)) == ["nothing said"] * 2


MISTAKES = [
    ("hybrid", 3, "3 query heads do not divide over 2 ranks of a node; numbers that fit: 1, 3"),
    ("hybrid_context_first", 3, "3 query heads do not divide over 2 nodes"),
    ("alltoall", 6, "6 query heads do not divide over 4 ranks"),
]


def mistaken(group: Any, rotation: str, heads: int) -> str:
    q = torch.zeros(1, 8, heads, 8)
    try:
        lhcp.ring_attention(q, q, q, group=group, rotation=rotation)
    except ValueError as error:
        return str(error)
    return "nothing said"


@pytest.mark.parametrize(("rotation", "heads", "said"), MISTAKES)
def test_heads_that_do_not_divide_are_refused(
    ranks: RankPool, rotation: str, heads: int, said: str
) -> None:
    """Fails if the error comes after a message, or names nothing that would fit."""
    for told in ranks.run(mistaken, 4, rotation, heads, num_nodes=2):
        assert said in told


@pytest.mark.parametrize("rotation", HYBRIDS)
def test_one_axis_is_refused(ranks: RankPool, rotation: str) -> None:
    """Fails if nodes are guessed."""
    for told in ranks.run(mistaken, 4, rotation, 4):
        assert "needs a DeviceMesh of two axes" in told
