"""The gradient is the same on every mesh: FSDP2 by its own average, HSDP, DDP, tensor parallelism.

Whole gradients and their norm are compared, not losses after steps of AdamW, which hides a wrong
scale. The meshes of 4 ranks each add one thing to a sequence over ranks that can go wrong: more
ranks, several sequences, replicas, cut heads; those of 8 have two of them together.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import lhcp
from lhcp.comm.layout import LayoutName
from lhcp.layer.module import Mode
from lhcp.ring.heads import TWO_AXES
from lhcp.testing.inputs import small_config
from lhcp.testing.ranks import RankPool
from tests import llama

CONFIG, SEQLEN = small_config(num_strata=16)
BATCH = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """A mesh, and how a model is put on it."""

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ddp: bool = False
    """Plain DDP over all ranks in the place of FSDP2."""
    layout: LayoutName = "zigzag"
    linear: bool = True
    """`linear_loss` inside the model's forward; else `loss` of its logits."""
    recompute: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.dp_replicate, self.dp_shard, self.cp, self.tp

    def __str__(self) -> str:
        words = [f"{name}{size}" for name, size in zip(AXES, self.shape, strict=True) if size > 1]
        words += [name for name in ("ddp", "recompute") if getattr(self, name)]
        return "-".join([*words, self.layout, "linear" if self.linear else "logits"])


AXES = ("dp_replicate", "dp_shard", "cp", "tp")

ON_FOUR = [
    Case(cp=4),
    Case(cp=4, layout="contiguous", linear=False, recompute=True),
    Case(dp_shard=2, cp=2, recompute=True),
    Case(dp_replicate=2, cp=2),
    Case(cp=2, tp=2, linear=False),
    Case(cp=2, tp=2, recompute=True, layout="contiguous"),
    Case(dp_shard=2, cp=2, ddp=True),
]

ON_EIGHT = [
    Case(cp=8),
    Case(dp_replicate=2, dp_shard=2, cp=2, recompute=True),
    Case(dp_shard=2, cp=2, tp=2),
    Case(dp_replicate=2, cp=2, tp=2, linear=False),
    Case(cp=4, tp=2, recompute=True),
]


def batch() -> dict[str, Tensor]:
    """Tokens, and labels of which rows and places have unequally many."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(llama.VOCABULARY, (BATCH, SEQLEN), generator=generator)
    labels = ids.clone()
    labels[0, : SEQLEN // 3] = -100
    labels[1, ::3] = -100
    labels[3, 7:] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole gradients by name, the same on every rank."""
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        found[name.removeprefix("module.")] = (
            grad.full_tensor() if isinstance(grad, DTensor) else grad
        )
    return found


def attention(cp: lhcp.ContextParallel) -> llama.MakeAttention:
    # The first layer is dense: equal tokens have equal scores there, and rounding ranks them.
    return lambda layer: cp.attention(CONFIG if layer else None)


@lru_cache
def expected(mode: Mode, dtype: torch.dtype) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one rank, with torch's own loss on the whole batch."""
    model = llama.make(attention(lhcp.ContextParallel()), dtype)
    lhcp.set_mode(model, mode)
    whole = batch()
    logits = model(whole["input_ids"], torch.arange(SEQLEN), None)[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), whole["labels"][:, 1:].flatten())
    loss.backward()
    return loss.item(), gradients(model)


def shard_model(model: llama.Llama, mesh: DeviceMesh, case: Case) -> None:
    """Call fully_shard as a user does, without a word on how gradients are divided."""
    mesh["dp_shard", "cp"]._flatten("dp_shard_cp")
    names = ("dp_replicate", "dp_shard_cp") if case.dp_replicate > 1 else ("dp_shard_cp",)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh[names])


def on_a_mesh(
    group: Any, case: Case, mode: Mode, dtype: torch.dtype
) -> tuple[float, dict[str, Tensor]]:
    mesh = init_device_mesh("cpu", case.shape, mesh_dim_names=AXES)
    cp = lhcp.ContextParallel(mesh["cp"], layout=case.layout)
    model = llama.make(attention(cp), dtype)
    lhcp.set_mode(model, mode)
    model.recompute = case.recompute
    if case.tp > 1:
        llama.tensor_parallel(model, mesh["tp"])
    run: Any = model
    if case.ddp:
        run = DistributedDataParallel(model)
    else:
        shard_model(model, mesh, case)
    num_dp = case.dp_replicate * case.dp_shard
    row = mesh["dp_replicate"].get_local_rank() * case.dp_shard + mesh["dp_shard"].get_local_rank()
    mine = cp.shard({key: x.chunk(num_dp)[row] for key, x in batch().items()})
    tokens, positions, labels = (mine[key] for key in ("input_ids", "position_ids", "shift_labels"))
    over = mesh["dp_replicate", "dp_shard", "cp"]
    if case.linear:
        loss = run(tokens, positions, lambda x, w: cp.linear_loss(x, w, labels, over=over))
    else:
        loss = cp.loss(run(tokens, positions, None), labels, over=over)
    loss.backward()
    return loss.item(), gradients(run)


def check(
    results: list[tuple[float, dict[str, Tensor]]], mode: Mode, dtype: torch.dtype, budget: float
) -> None:
    loss, grads = expected(mode, dtype)
    norm = torch.stack([g.norm() for g in grads.values()]).norm()
    for value, found in results:
        assert value == pytest.approx(loss, rel=budget)
        total = torch.stack([found[name].norm() for name in grads]).norm()
        assert total.item() == pytest.approx(norm.item(), rel=budget)
        for name, grad in grads.items():
            error = (found[name] - grad).norm() / norm
            assert error <= budget, f"{name}: {error:.1e} of the gradient's norm"


@pytest.mark.parametrize("mode", ["dense", "lighthouse"])
@pytest.mark.parametrize("case", ON_FOUR, ids=str)
def test_gradients_are_one_ranks(ranks: RankPool, case: Case, mode: Mode) -> None:
    """Fails if a mesh scales, loses or doubles a gradient, or selects otherwise."""
    dtype = torch.float64
    check(ranks.run(on_a_mesh, 4, case, mode, dtype), mode, dtype, 1e-12)


@pytest.mark.parametrize("case", [ON_FOUR[2], ON_FOUR[3]], ids=str)
def test_float32_gradients_are_averaged_by_fsdp_itself(ranks: RankPool, case: Case) -> None:
    """Fails if what FSDP does to float32, an average inside the collective, is another than to
    float64, or cannot be done on gloo, as a divide factor of 1."""
    dtype = torch.float32
    check(ranks.run(on_a_mesh, 4, case, "dense", dtype), "dense", dtype, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["dense", "lighthouse"])
@pytest.mark.parametrize("case", ON_EIGHT, ids=str)
def test_gradients_of_eight_ranks_are_one_ranks(
    eight_ranks: RankPool, case: Case, mode: Mode
) -> None:
    """As on four, where three axes meet."""
    dtype = torch.float64
    check(eight_ranks.run(on_a_mesh, 8, case, mode, dtype), mode, dtype, 1e-12)


def on_two_nodes(
    group: Any, rotation: str, mode: Mode, dtype: torch.dtype
) -> tuple[float, dict[str, Tensor]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))
    cp = lhcp.ContextParallel(mesh, rotation=rotation)
    model = llama.make(attention(cp), dtype)
    lhcp.set_mode(model, mode)
    everyone = mesh._flatten("everyone")
    for module in (*model.blocks, model):
        fully_shard(module, mesh=everyone)
    mine = cp.shard(batch())
    tokens, positions, labels = (mine[key] for key in ("input_ids", "position_ids", "shift_labels"))
    loss = model(tokens, positions, lambda x, w: cp.linear_loss(x, w, labels, over=mesh))
    loss.backward()
    return loss.item(), gradients(model)


@pytest.mark.parametrize("mode", ["dense", "lighthouse"])
@pytest.mark.parametrize("rotation", TWO_AXES)
def test_gradients_on_two_nodes_are_one_ranks(ranks: RankPool, rotation: str, mode: Mode) -> None:
    """Fails if nodes and ranks have another gradient: a checkpoint would not go on there."""
    dtype = torch.float64
    check(ranks.run(on_two_nodes, 4, rotation, mode, dtype), mode, dtype, 1e-12)
