"""What stands around a call: autocast, second derivatives, a mesh's order, a default device."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

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
    # On all ranks of the pool: those without the group would name later ones apart.
    for same, said in ranks.run(copies, 4):
        assert same and "load a state_dict instead" in said
    alone = lhcp.LighthouseAttention(CONFIG, timers=lhcp.Timers())
    again = pickle.loads(pickle.dumps(alone))
    assert again.ranks == alone.ranks and again.timers.spans() == []


def mixed(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q and k as rotary tables in float32 leave them under autocast, and v of lower precision."""
    q, k, v, _ = qkv(SEQLEN, num_kv_heads=2, dtype=torch.float32)
    return q, k, v.to(dtype)


@pytest.mark.parametrize("attend", CALLS[:2])
def test_rotary_tables_in_float32_under_autocast(attend: Any) -> None:
    """Fails if what torch's own attention takes is refused, or taken in another precision."""
    q, k, v = (x.requires_grad_() for x in mixed(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(q, k, v)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, attend(q.bfloat16(), k.bfloat16(), v))
    grads = torch.autograd.grad(out.float().sum(), (q, k, v))
    assert [g.dtype for g in grads] == [torch.float32, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("attend", CALLS[:2])
def test_two_dtypes_without_autocast(attend: Any) -> None:
    """Fails if the remedy does not come first."""
    with pytest.raises(TypeError, match=r"^q, k, v must have one dtype: cast them, .*rotary"):
        attend(*mixed(torch.bfloat16))
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match=r"v is torch\.int32"),
    ):
        attend(*mixed(torch.int32))


def with_dtensors(group: Any) -> list[str]:
    """Pass DTensors wherever a tensor goes in; return what is said."""
    mesh = DeviceMesh("cpu", list(range(4)), mesh_dim_names=("tp",))
    q, k, v, _ = (distribute_tensor(x, mesh, [Shard(2)]) for x in qkv(SEQLEN, num_kv_heads=4))
    said = []
    for use in (
        lambda: dense(q, k, v),
        lambda: sparse(q, k, v),
        lambda: sparse(*(x.to_local() for x in (q, k, v)), score_q=q),
        lambda: lhcp.select(q, k, config=CONFIG),
        lambda: lhcp.shard(q),
        lambda: lhcp.unshard(q),
        lambda: lhcp.pad_to_multiple(q, 3),
    ):
        with pytest.raises(TypeError) as error:
            use()
        said.append(str(error.value))
    return said


def test_dtensors_are_refused_in_our_words(ranks: RankPool) -> None:
    """Fails if torch says of one of our operators that it has no sharding strategy."""
    for said in ranks.run(with_dtensors, 4):
        assert all("is a DTensor: pass" in text and ".to_local()" in text for text in said), said


def test_the_world_before_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if dist.group.WORLD, which is None before init, is taken for one rank in silence."""
    q, k, v, _ = qkv(SEQLEN, num_kv_heads=2)
    early = lhcp.LighthouseAttention(None, dist.group.WORLD)
    monkeypatch.setenv("WORLD_SIZE", "4")
    for use in (
        lambda: lhcp.LighthouseAttention(CONFIG, dist.group.WORLD),
        lambda: lhcp.positions(64, dist.group.WORLD),
        lambda: dense(q, k, v, group=dist.group.WORLD),
    ):
        with pytest.raises(ValueError, match=r"one of 4 \(WORLD_SIZE\).*init_process_group first"):
            use()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    with pytest.raises(RuntimeError, match="made with group=None before init_process_group"):
        early(q, k, v)
    # Made after it, None is a choice.
    assert lhcp.LighthouseAttention(None)(q, k, v).shape == q.shape


@pytest.mark.parametrize("attend", [sparse, dilated])
def test_a_selection_of_inference_mode(attend: Any) -> None:
    """Fails if a selection made without autograd cannot be trained with, or differs."""
    config, seqlen = (DILATED, DILATED_SEQLEN) if attend is dilated else (CONFIG, SEQLEN)
    q, k, v, do = qkv(seqlen, num_kv_heads=2)
    with torch.inference_mode():
        selection = lhcp.select(q, k, v=v, config=config)
    q.requires_grad_()
    outs = [attend(q, k, v, selection=selection), attend(q, k, v)]
    grads = [torch.autograd.grad(out, q, do)[0] for out in outs]
    assert torch.equal(*outs) and torch.equal(*grads)


@pytest.mark.parametrize("frozen", ["kv", "q", "v"])
@pytest.mark.parametrize("attend", CALLS)
def test_frozen_inputs(attend: Any, frozen: str) -> None:
    """Fails if the gradient of one input depends on whether another's is wanted."""
    seqlen = DILATED_SEQLEN if attend is dilated else SEQLEN
    *inputs, do = qkv(seqlen, num_kv_heads=2)
    for x in inputs:
        x.requires_grad_()
    full = dict(zip("qkv", torch.autograd.grad(attend(*inputs), inputs, do), strict=True))
    free = [name for name in "qkv" if name not in frozen]
    parts = [x if name in free else x.detach() for name, x in zip("qkv", inputs, strict=True)]
    wanted = [x for name, x in zip("qkv", parts, strict=True) if name in free]
    grads = torch.autograd.grad(attend(*parts), wanted, do)
    assert all(torch.equal(full[name], g) for name, g in zip(free, grads, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("attend", CALLS)
def test_both_kinds_of_checkpointing(attend: Any, reentrant: bool) -> None:
    """Fails if what is recomputed is another selection, or another result."""
    seqlen = DILATED_SEQLEN if attend is dilated else SEQLEN
    *inputs, do = qkv(seqlen, num_kv_heads=2)
    for x in inputs:
        x.requires_grad_()
    plain = torch.autograd.grad(attend(*inputs), inputs, do)
    again = checkpoint(attend, *inputs, use_reentrant=reentrant)
    torch.autograd.backward(again, do)
    assert all(torch.equal(g, x.grad) for g, x in zip(plain, inputs, strict=True))


def in_a_part(group: Any) -> float:
    """Attend in the group of ranks 1 and 3, with sizes that are nobody's power of two."""
    part, others = dist.new_group([1, 3]), dist.new_group([0, 2])
    own = part if group.rank() % 2 else others
    q, k, v, _ = (x[..., :5].contiguous() for x in qkv(12, num_heads=3, num_kv_heads=1, batch=3))
    ours = lhcp.ring_attention(*(lhcp.shard(x, own) for x in (q, k, v)), group=own)
    return (lhcp.unshard(ours, own) - lhcp.ring_attention(q, k, v)).abs().max().item()


def test_a_part_of_the_world_and_odd_sizes(ranks: RankPool) -> None:
    """Fails if ranks of the world are taken for ranks of the group."""
    assert all(error < 1e-12 for error in ranks.run(in_a_part, 4))


def with_a_default_device(group: Any, name: str) -> bool:
    """Whether batch and layers are what they are without a default device that has no data."""
    cp = lhcp.ContextParallel(group)
    inputs = [lhcp.shard(x, group) for x in qkv(SEQLEN, num_kv_heads=2, batch=2)]
    ids = torch.arange(2 * SEQLEN).view(2, SEQLEN)
    cu_seqlens = torch.tensor([0, 70, SEQLEN, 2 * SEQLEN], dtype=torch.int32)

    def everything() -> list[Tensor]:
        q, k, v, do = (x.clone().requires_grad_() for x in inputs)
        packed = {"input_ids": ids, "labels": ids, "cu_seqlens": cu_seqlens.clone()}
        batch = cp.shard(packed, pad_to=SEQLEN + 64)
        made = [batch[key] for key in sorted(batch)]
        attend = cp.attention(CONFIG)
        for documents in (None, cu_seqlens.clone()):
            for attend.mode in ("lighthouse", "dense"):
                made.append(attend(q, k, v, cu_seqlens=documents))
        torch.autograd.backward(made[-4:], [do] * 4)
        return [*made, q.grad, k.grad, v.grad]  # type: ignore[list-item]

    expected = everything()
    with torch.device(name):
        found = everything()
    return all(x.device == y.device for x, y in zip(found, expected, strict=True)) and all(
        map(torch.equal, found, expected)
    )


def test_a_default_device_is_not_taken_for_the_hosts(ranks: RankPool) -> None:
    """Fails if what is read on the host is made on the device of torch.set_default_device."""
    assert all(ranks.run(with_a_default_device, 2, "meta"))
