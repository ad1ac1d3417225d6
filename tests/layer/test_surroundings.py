"""What stands around a call: autocast, second derivatives, a learnt scale, a mesh's order."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import lhcp
from lhcp.testing.inputs import qkv, small_config
from lhcp.testing.ranks import RankPool

CONFIG, SEQLEN = small_config()
DILATED, DILATED_SEQLEN = small_config(scorer="dilated", dilation=2)


def dense(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return lhcp.ring_attention(q, k, v, **options)


def sparse(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return lhcp.lighthouse_attention(q, k, v, config=CONFIG, **options)


def dilated(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return lhcp.lighthouse_attention(q, k, v, config=DILATED, **options)


CALLS = [pytest.param(f, id=f.__name__) for f in (dense, sparse, dilated)]


def answer(
    attend: Any, dtype: torch.dtype, group: Any = None, **options: Any
) -> tuple[Tensor, ...]:
    seqlen = DILATED_SEQLEN if attend is dilated else SEQLEN
    q, k, v, do = (lhcp.shard(x, group) for x in qkv(seqlen, num_kv_heads=2, dtype=dtype))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attend(*leaves, group=group, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, do)


@pytest.mark.parametrize("timed", [False, True], ids=["operators", "timers"])
@pytest.mark.parametrize("backend", ["math", "cpu"])
@pytest.mark.parametrize("attend", CALLS)
def test_autocast_stays_outside(attend: Any, backend: str, timed: bool) -> None:
    """Fails if a caller's autocast rounds float32 inputs inside, forward or backward."""
    options = {"backend": backend} | ({"timers": lhcp.Timers()} if timed else {})
    plain = answer(attend, torch.float32, **options)
    with torch.autocast("cpu", torch.bfloat16):
        inside = answer(attend, torch.float32, **options)
    for one, two in zip(plain, inside, strict=True):
        assert one.dtype == two.dtype == torch.float32 and torch.equal(one, two)


def autocast_on_ranks(group: Any, rotation: str) -> bool:
    plain = answer(dense, torch.float32, group, rotation=rotation, backend="math")
    with torch.autocast("cpu", torch.bfloat16):
        inside = answer(dense, torch.float32, group, rotation=rotation, backend="math")
    return all(torch.equal(*pair) for pair in zip(plain, inside, strict=True))


@pytest.mark.parametrize("rotation", ["p2p", "allgather", "alltoall"])
def test_autocast_stays_outside_of_ranks(ranks: RankPool, rotation: str) -> None:
    """Fails if a message or a merge is rounded because of a caller's autocast."""
    assert ranks.run(autocast_on_ranks, 2, rotation) == [True, True]


def twice(attend: Any, group: Any = None, **options: Any) -> str:
    q, k, v, do = (lhcp.shard(x, group) for x in qkv(SEQLEN, num_kv_heads=2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attend(*leaves, group=group, **options)
    grads = torch.autograd.grad(out, leaves, do, create_graph=True)
    try:
        torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
    except RuntimeError as error:
        return str(error)
    return "nothing said"


@pytest.mark.parametrize("timed", [False, True], ids=["operators", "timers"])
@pytest.mark.parametrize("attend", CALLS[:2])
def test_a_second_derivative_is_refused(attend: Any, timed: bool) -> None:
    """Fails if a gradient of a gradient is a number: it would be wrong."""
    said = twice(attend, backend="math", **({"timers": lhcp.Timers()} if timed else {}))
    assert "differentiate twice" in said


def twice_on_ranks(group: Any, rotation: str) -> tuple[str, str]:
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(
        lhcp.unshard(x, group, dim=0).square().sum(), x, create_graph=True
    )
    try:
        torch.autograd.grad(grad.sum(), x)
        unsharded = "nothing said"
    except RuntimeError as error:
        unsharded = str(error)
    return twice(dense, group, rotation=rotation, backend="math"), unsharded


@pytest.mark.parametrize("rotation", ["p2p", "alltoall"])
def test_a_second_derivative_is_refused_across_ranks(ranks: RankPool, rotation: str) -> None:
    """Fails if one of the functions that send answers with a wrong number."""
    for said in ranks.run(twice_on_ranks, 2, rotation):
        assert all("differentiate twice" in text for text in said), said


@pytest.mark.parametrize("scale", [torch.nn.Parameter(torch.ones(())), torch.ones(()), "2", True])
@pytest.mark.parametrize("attend", CALLS)
def test_a_scale_that_would_not_be_trained_is_refused(attend: Any, scale: Any) -> None:
    """Fails if a learnt scale is taken and gets no gradient, or a layer makes it its parameter."""
    with pytest.raises(TypeError, match=r"scale is a \w+: must be a float.*multiply q"):
        answer(attend, torch.float64, scale=scale)
    with pytest.raises(TypeError, match="scale is a"):
        lhcp.LighthouseAttention(CONFIG, scale=scale)


def on_a_cyclic_mesh(group: Any) -> list[str]:
    """Ranks dealt to nodes in turn: their coordinates are not their ranks in the flat group."""
    mesh = DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=("node", "local"))
    said = []
    for attend in (dense, sparse):
        try:
            answer(attend, torch.float64, mesh)
            said.append("nothing said")
        except ValueError as error:
            said.append(str(error))
    return said


def test_a_mesh_that_does_not_ascend_is_refused(ranks: RankPool) -> None:
    """Fails if ranks attend to others' chunks in silence, or the advice is not what would fit."""
    for said in ranks.run(on_a_cyclic_mesh, 4):
        for text in said:
            assert "[[0, 2], [1, 3]]" in text and "for example [[0, 1], [2, 3]]" in text


def copies(group: Any) -> tuple[bool, str]:
    """Copy a layer in every way; then restore one whose groups are gone."""
    layer = torch.nn.Sequential(lhcp.LighthouseAttention(CONFIG, group))
    q, k, v, _ = (lhcp.shard(x, group) for x in qkv(SEQLEN, num_kv_heads=2))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    made = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
        torch.optim.swa_utils.AveragedModel(layer).module,
    ]
    want = layer[0](q, k, v)
    same = all(torch.equal(other[0](q, k, v), want) for other in made)
    same &= all(other[0].timers is layer[0].timers for other in made)
    own = dist.new_group([group.rank()], use_local_synchronization=True)
    gone = pickle.dumps(lhcp.LighthouseAttention(None, own))
    dist.destroy_process_group(own)
    try:
        pickle.loads(gone)
        said = "nothing said"
    except RuntimeError as error:
        said = str(error)
    return same, said


def test_a_layer_can_be_copied(ranks: RankPool) -> None:
    """Fails if a copy, a pickle or an average of a layer with a group is an error."""
    for same, said in ranks.run(copies, 2):
        assert same and "load a state_dict instead" in said
    alone = lhcp.LighthouseAttention(CONFIG, timers=lhcp.Timers())
    again = pickle.loads(pickle.dumps(alone))
    assert again.ranks == alone.ranks and again.timers.spans() == []
