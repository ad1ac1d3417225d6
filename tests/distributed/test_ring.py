"""Dense ring attention against whole-sequence attention, on one rank and on several."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import lhcp
from lhcp import reference
from lhcp.comm.layout import LayoutName
from lhcp.comm.mesh import as_ranks
from lhcp.layer.choices import Choices
from lhcp.layer.plan import make_plan
from lhcp.ring.attention import attention
from lhcp.ring.block import BLOCKS
from lhcp.ring.block.base import BackwardInputs
from lhcp.ring.block.torch_ops import CPU
from lhcp.ring.kv import KV
from lhcp.ring.plan import RingPlan
from lhcp.ring.shape import CAUSAL, FULL, Mask, Tuning
from lhcp.testing.inputs import qkv
from lhcp.testing.ranks import RankPool
from lhcp.testing.tolerance import assert_close_float64, assert_within_budget
from lhcp.timing import UNTIMED
from tests.cases import (
    LAYOUTS,
    ROTATIONS,
    TWO_AXES,
    covering,
    dense_reference,
    serves,
    strided,
    together,
)

Results = tuple[Tensor, ...]
NAMES = ("o", "dq", "dk", "dv")


@dataclass(frozen=True, kw_only=True)
class Dense:
    """One dense attention."""

    world_size: int
    layout: LayoutName = "zigzag"
    rotation: str = "p2p"
    backend: str = "auto"
    causal: bool = True
    chunk: int = 5
    """Tokens of a chunk if there are two a rank: N / (2 W)."""
    batch: int = 1
    num_kv_heads: int = 2
    groups: int = 1
    head_dim: int = 8
    scale: float | None = None
    dtype: torch.dtype = torch.float64

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return qkv(
            2 * self.world_size * self.chunk,
            batch=self.batch,
            num_heads=self.num_kv_heads * self.groups,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            seed=self.chunk + self.world_size,
        )

    @property
    def num_nodes(self) -> int | None:
        return TWO_AXES[self.rotation][self.world_size][0] if self.rotation in TWO_AXES else None

    def __str__(self) -> str:
        causal = "causal" if self.causal else "full"
        words = [f"W{self.world_size}", self.layout, self.rotation, self.backend, causal]
        words += [f"n{self.chunk}B{self.batch}H{self.num_kv_heads}G{self.groups}D{self.head_dim}"]
        return "-".join(words + ([] if self.scale is None else ["scale"]))


def ring(group: Any, case: Dense) -> Results:
    """This rank's o, dq, dk, dv and lse."""
    q, k, v, do = (lhcp.shard(x, group, layout=case.layout) for x in case.inputs())
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    o, lse = lhcp.ring_attention(
        q,
        k,
        v,
        group=group,
        layout=case.layout,
        rotation=case.rotation,
        backend=case.backend,
        causal=case.causal,
        scale=case.scale,
        return_lse=True,
    )
    assert not lse.requires_grad
    return o.detach(), *torch.autograd.grad(o, (q, k, v), do), lse


@lru_cache(maxsize=4)
def expected(case: Dense, dtype: torch.dtype) -> Results:
    q, k, v, do = (x.to(dtype) for x in case.inputs())
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    o, lse = dense_reference(q, k, v, case.causal, case.scale)
    return o.detach(), *torch.autograd.grad(o, (q, k, v), do), lse.detach()


def whole(parts: list[Results], layout: LayoutName) -> Results:
    return tuple(
        together([part[i] for part in parts], layout, dim=2 if i == 4 else 1) for i in range(5)
    )


FACTORS: dict[str, tuple[Any, ...]] = {
    "world_size": (1, 2, 3, 4),
    "layout": LAYOUTS,
    "rotation": ROTATIONS,
    "backend": ("cpu", "math"),
    "causal": (True, False),
    "chunk": (1, 5, 16),
    "batch": (1, 3),
    "num_kv_heads": (1, 2, 3, 4),
    "groups": (1, 2, 4),
    "head_dim": (5, 8),
    "scale": (None, 0.3),
}


def fits(choice: dict[str, Any]) -> bool:
    world_size = choice["world_size"]
    if world_size == 1:
        return bool(choice["rotation"] == "p2p")
    heads = choice["num_kv_heads"] * choice["groups"]
    return serves(choice["rotation"], world_size, heads)


CASES = [Dense(**choice) for choice in covering(FACTORS, fits)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_whole_attention(ranks: RankPool, case: Dense) -> None:
    """Fails if a block is missed, met twice or masked wrongly, or a gradient goes elsewhere."""
    got = whole(ranks.run(ring, case.world_size, case, num_nodes=case.num_nodes), case.layout)
    for name, ours, theirs in zip((*NAMES, "lse"), got, expected(case, torch.float64), strict=True):
        assert_close_float64(name, ours, theirs)


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_low_precision_is_within_budget(ranks: RankPool, dtype: torch.dtype, rotation: str) -> None:
    """Fails if out, lse or a gradient is merged over steps in low precision."""
    case = Dense(
        world_size=4,
        rotation=rotation,
        chunk=16,
        num_kv_heads=4,
        groups=2,
        head_dim=16,
        dtype=dtype,
    )
    got = whole(ranks.run(ring, 4, case, num_nodes=case.num_nodes), case.layout)
    same_dtype, exact = expected(case, dtype), expected(case, torch.float64)
    assert got[4].dtype == torch.float32
    # Steps are merged by an lse of float32, whose rounding weighs each part of a result.
    lse_eps = torch.finfo(torch.float32).eps * exact[4].abs().max().item()
    for name, ours, theirs, truth in zip(NAMES, got, same_dtype, exact, strict=False):
        assert ours.dtype == dtype
        assert_within_budget(name, ours, theirs, truth, lse_eps * truth.abs().max().item())
    # What the backend itself has for the whole sequence is the measure of lse: torch's kernel
    # approximates exp for half precision.
    q, k, v, _ = case.inputs()
    alone = CPU.forward(q, KV(k, v), CAUSAL, q.shape[3] ** -0.5)[1]
    assert_within_budget("lse", got[4], alone, exact[4])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_are_merged_wide(ranks: RankPool, layout: LayoutName) -> None:
    """Fails if out or dq is kept in bf16 from step to step.

    Each part is rounded once, as the backend alone rounds the whole, and so is their sum: together
    sqrt(2) times the error of one rounding at most. A rounding a step is more.
    """
    case = Dense(
        world_size=4,
        layout=layout,
        causal=False,
        chunk=64,
        groups=2,
        head_dim=16,
        dtype=torch.bfloat16,
    )
    got = whole(ranks.run(ring, 4, case), layout)
    exact = expected(case, torch.float64)
    q, k, v, do = case.inputs()
    out, lse = CPU.forward(q, KV(k, v), FULL, 0.25)
    dq, *_ = CPU.backward(BackwardInputs(do, q, KV(k, v), out, lse), FULL, 0.25)

    def rms(x: Tensor, i: int) -> float:
        return (x.double() - exact[i]).square().mean().sqrt().item()

    assert rms(got[0], 0) < 2**0.5 * rms(out, 0)
    assert rms(got[1], 1) < 2**0.5 * rms(dq, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "math"])
def test_one_rank_is_the_backend_itself(ranks: RankPool, backend: str, dtype: torch.dtype) -> None:
    """Fails if one rank pays for a ring: it must return the backend's own bits."""
    case = Dense(world_size=1, backend=backend, chunk=16, groups=2, dtype=dtype)
    q, k, v, do = case.inputs()
    block, scale = BLOCKS[backend], q.shape[3] ** -0.5
    out, lse = block.forward(q, KV(k, v), CAUSAL, scale)
    grads = block.backward(BackwardInputs(do, q, KV(k, v), out, lse), CAUSAL, scale)
    in_a_group = ranks.run(ring, 1, case)[0]
    for ours, other, theirs in zip(ring(None, case), in_a_group, (out, *grads, lse), strict=True):
        assert torch.equal(ours, theirs) and torch.equal(other, theirs)
        assert ours.is_contiguous()


def test_is_the_reference_used_by_lighthouse() -> None:
    """Fails if the dense and the lighthouse references disagree: both are then in doubt."""
    q, k, v, _ = qkv(12, num_kv_heads=2)
    dense, _ = dense_reference(q, k, v, True, 0.4)
    assert torch.equal(dense, reference.causal_attention(q, k, v, 0.4))


def on_mesh(group: Any, case: Dense) -> bool:
    """Whether a DeviceMesh of one axis is the group, bit for bit."""
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("cp",))
    return all(torch.equal(*pair) for pair in zip(ring(mesh, case), ring(group, case), strict=True))


@pytest.mark.parametrize("rotation", ["p2p", "allgather"])
def test_a_mesh_is_its_group(ranks: RankPool, rotation: str) -> None:
    """Fails if a DeviceMesh gives other ranks, or another order of ranks, than its group."""
    assert all(ranks.run(on_mesh, 4, Dense(world_size=4, rotation=rotation, chunk=3)))


def on_two_axes(group: Any, case: Dense) -> list[bool]:
    """Compare meshes of two axes with the group, bit for bit; and what is said of them."""
    names = ("node", "local")
    # Two axes of three, as a user slices them from a larger mesh, among them.
    three = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("dp", *names))
    meshes: list[DeviceMesh] = [three[names]]
    meshes += [init_device_mesh("cpu", shape, mesh_dim_names=names) for shape in ((2, 2), (4, 1))]
    found = []
    for mesh in meshes:
        by_mesh, by_ranks = ring(mesh, case), ring(as_ranks(mesh), case)
        found.append(all(torch.equal(*pair) for pair in zip(by_mesh, by_ranks, strict=True)))
        for other in ("auto", "p2p", "allgather"):
            with pytest.raises(ValueError, match=r'pass the axis .* mesh\["local"\]'):
                ring(mesh, replace(case, rotation=other))
            with pytest.raises(ValueError, match="two axes"):
                lhcp.LighthouseAttention(None, mesh, rotation=other)
    return found


def test_two_axes_are_for_hierarchical_by_name(ranks: RankPool) -> None:
    """Fails if a layer given ("dp", "cp") attends across dp, or if nodes cannot be given."""
    case = Dense(world_size=4, rotation="hierarchical", chunk=3)
    for same in ranks.run(on_two_axes, 4, case):
        assert same == [True] * 3


@pytest.mark.parametrize("num_nodes", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_hierarchical_on_any_shape_of_nodes(
    ranks: RankPool, layout: LayoutName, causal: bool, num_nodes: int
) -> None:
    """Fails if the ring of gathers assumes more than one node, or more than one rank a node."""
    case = Dense(world_size=4, layout=layout, rotation="hierarchical", causal=causal, batch=2)
    got = whole(ranks.run(ring, 4, case, num_nodes=num_nodes), layout)
    for name, ours, theirs in zip((*NAMES, "lse"), got, expected(case, torch.float64), strict=True):
        assert_close_float64(name, ours, theirs)


def tuned_plan(group: Any, case: Dense, tuning: Tuning) -> RingPlan:
    """The plan of a case, cut up as `tuning` says."""
    q, k, _, _ = (lhcp.shard(x, group, layout=case.layout) for x in case.inputs())
    choices = Choices(case.layout, case.rotation, case.backend, scale=case.scale)
    plan = make_plan(q, k, as_ranks(group), choices, Mask(case.causal))
    return replace(plan, shape=replace(plan.shape, tuning=tuning))


def by_plan(group: Any, case: Dense, plan: RingPlan) -> Results:
    """`ring`, by a plan that a caller cannot ask for."""
    q, k, v, do = (lhcp.shard(x, group, layout=case.layout) for x in case.inputs())
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    o, lse = attention(q, k, v, plan, UNTIMED)
    return o.detach(), *torch.autograd.grad(o, (q, k, v), do), lse


def as_a_long_sequence(
    group: Any, case: Dense, lengths: tuple[int, ...], more: dict[str, int]
) -> Results:
    """`ring` in rounds of these lengths, tuned so."""
    plan = tuned_plan(group, case, Tuning(round_length=lengths[0], **more))
    assert tuple(map(len, plan.shape.rounds)) == lengths
    return by_plan(group, case, plan)


@pytest.mark.parametrize("lengths", [(1, 1, 1), (2, 1), (3,)], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rounds_of_a_long_sequence(
    ranks: RankPool, layout: LayoutName, causal: bool, lengths: tuple[int, ...]
) -> None:
    """Fails if a sum on the way loses what was summed before, or a round its order of chunks."""
    case = Dense(world_size=4, layout=layout, rotation="p2p", causal=causal, groups=2, batch=2)
    # Nothing is held: sums are made on the way.
    got = whole(ranks.run(as_a_long_sequence, 4, case, lengths, {"held_bytes": 0}), layout)
    for name, ours, theirs in zip((*NAMES, "lse"), got, expected(case, torch.float64), strict=True):
        assert_close_float64(name, ours, theirs)


@pytest.mark.parametrize("held_bytes", [0, 2**28], ids=["on the way", "held"])
@pytest.mark.parametrize("lengths", [(1, 1, 1), (2, 1), (3,)], ids=str)
def test_a_part_of_the_own_keys_comes_last(
    ranks: RankPool, lengths: tuple[int, ...], held_bytes: int
) -> None:
    """Fails if the part is lost, counted twice, or summed into another chunk or round's parts."""
    case = Dense(world_size=4, layout="zigzag", rotation="p2p", causal=True, groups=2, batch=2)
    split = {"held_bytes": held_bytes, "min_hidden_bytes": 0, "min_hiding_pairs": 0}
    got = whole(ranks.run(as_a_long_sequence, 4, case, lengths, split), "zigzag")
    for name, ours, theirs in zip((*NAMES, "lse"), got, expected(case, torch.float64), strict=True):
        assert_close_float64(name, ours, theirs)


def in_head_groups(group: Any, case: Dense) -> Results:
    """`ring` with the gather cut into as many groups of heads as there are."""
    plan = tuned_plan(group, case, Tuning(num_head_groups=case.num_kv_heads))
    assert len(plan.shape.head_groups) == case.num_kv_heads
    return by_plan(group, case, plan)


@pytest.mark.parametrize("num_kv_heads", [3, 4])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_allgather_by_groups_of_heads(
    ranks: RankPool, layout: LayoutName, causal: bool, num_kv_heads: int
) -> None:
    """Fails if a group of heads is written over, or lands on other heads."""
    case = Dense(
        world_size=4,
        layout=layout,
        rotation="allgather",
        causal=causal,
        num_kv_heads=num_kv_heads,
        groups=2,
        batch=2,
    )
    got = whole(ranks.run(in_head_groups, 4, case), layout)
    for name, ours, theirs in zip((*NAMES, "lse"), got, expected(case, torch.float64), strict=True):
        assert_close_float64(name, ours, theirs)


def from_views(group: Any, case: Dense) -> bool:
    """Compare inputs and gradients that are not contiguous with contiguous ones, bit for bit."""
    q, k, v, do = (lhcp.shard(x, group, layout=case.layout) for x in case.inputs())
    results = []
    for change in (torch.clone, strided):
        qkv_ = [change(x).requires_grad_() for x in (q, k, v)]
        o = lhcp.ring_attention(*qkv_, group=group, layout=case.layout, rotation=case.rotation)
        results.append((o, *torch.autograd.grad(o, qkv_, change(do))))
    return all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_inputs_need_not_be_contiguous(ranks: RankPool, rotation: str) -> None:
    """Fails if a message or a block reads a view as if it were packed."""
    case = Dense(world_size=2, rotation=rotation, chunk=8, groups=2, batch=2)
    assert from_views(None, Dense(world_size=1))
    assert all(ranks.run(from_views, 2, case, num_nodes=case.num_nodes))


def expanded_gradient(group: Any, case: Dense) -> Results:
    """Gradients of a plain sum: the output's gradient is an expanded scalar."""
    q, k, v, _ = (lhcp.shard(x, group, layout=case.layout) for x in case.inputs())
    qkv_ = [x.requires_grad_() for x in (q, k, v)]
    o = lhcp.ring_attention(*qkv_, group=group, layout=case.layout, rotation=case.rotation)
    return torch.autograd.grad(o.sum(), qkv_)


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_gradient_of_a_sum(ranks: RankPool, rotation: str) -> None:
    """Fails if a kernel is given a gradient without strides."""
    case = Dense(world_size=2, rotation=rotation, groups=2)
    q, k, v, _ = (x.requires_grad_() for x in case.inputs())
    theirs = torch.autograd.grad(dense_reference(q, k, v, True)[0].sum(), (q, k, v))
    parts = ranks.run(expanded_gradient, 2, case, num_nodes=case.num_nodes)
    for i, name in enumerate(("dq", "dk", "dv")):
        assert_close_float64(name, together([part[i] for part in parts], case.layout), theirs[i])
