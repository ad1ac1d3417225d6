"""`ContextParallel`: its layers, its sdpa, its mirror of shard, and what it refuses."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import lhcp
from lhcp.comm.layout import LayoutName
from lhcp.testing.inputs import qkv, small_config
from lhcp.testing.ranks import RankPool
from lhcp.testing.tolerance import assert_close_float64
from tests.cases import LAYOUTS, together

CONFIG, SEQLEN = small_config()


def attended(group: Any, layout: LayoutName, config: lhcp.LighthouseConfig | None) -> Tensor:
    cp = lhcp.ContextParallel(group, layout=layout)
    q, k, v, _ = (cp.shard(x) for x in qkv(SEQLEN, num_kv_heads=2))
    return cp.unshard(cp.attention(config)(q, k, v))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("config", [CONFIG, None], ids=["lighthouse", "dense"])
def test_layers_share_group_and_layout(
    ranks: RankPool, layout: LayoutName, config: lhcp.LighthouseConfig | None
) -> None:
    """Fails if a layer is made with a default in the place of the object's choice."""
    whole = attended(None, layout, config)
    for found in ranks.run(attended, 2, layout, config):
        assert_close_float64("output", found, whole)


def test_choices_are_given_once() -> None:
    """Fails if a choice does not reach a layer."""
    timers = lhcp.Timers()
    cp = lhcp.ContextParallel(
        layout="contiguous", rotation="p2p", backend="math", kernels="torch", timers=timers
    )
    layer = cp.attention(CONFIG, scale=0.5)
    assert layer.config is CONFIG and layer.scale == 0.5 and layer.timers is timers
    assert (layer.layout, layer.rotation) == ("contiguous", "p2p")
    assert (layer.backend, layer.kernels) == ("math", "torch")
    assert "rank 0 of 1, layout='contiguous', rotation='p2p', backend='math'" in repr(cp)


def sdpa_on_a_rank(group: Any, layout: LayoutName, scale: float | None) -> list[Tensor]:
    """Output and gradients of q, k and v, whole, in torch's order of axes."""
    cp = lhcp.ContextParallel(group, layout=layout)
    q, k, v, do = (cp.shard(x.transpose(1, 2), dim=2) for x in qkv(32, num_kv_heads=2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = cp.sdpa(*leaves, is_causal=True, enable_gqa=True, scale=scale)
    return [cp.unshard(x, dim=2) for x in (o.detach(), *torch.autograd.grad(o, leaves, do))]


@pytest.mark.parametrize("scale", [None, 0.3], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sdpa_is_torchs(ranks: RankPool, layout: LayoutName, scale: float | None) -> None:
    """Fails if axes are taken in another order, or the scale is that of an earlier call."""
    q, k, v, do = (x.transpose(1, 2) for x in qkv(32, num_kv_heads=2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True, scale=scale)
    expected = [o.detach(), *torch.autograd.grad(o, leaves, do)]
    for found in ranks.run(sdpa_on_a_rank, 2, layout, scale):
        for name, x, y in zip(("o", "dq", "dk", "dv"), found, expected, strict=True):
            assert_close_float64(name, x, y)


def test_sdpa_keeps_each_call_s_scale() -> None:
    """Fails if the scale of an earlier call stays."""
    cp = lhcp.ContextParallel()
    q, k, v, _ = (x.transpose(1, 2) for x in qkv(32))
    for scale in (0.1, 1.0, 0.1, None):
        ours = cp.sdpa(q, k, v, None, 0.0, True, scale)
        theirs = F.scaled_dot_product_attention(q, k, v, None, 0.0, True, scale=scale)
        assert_close_float64("o", ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sdpa_has_torchs_dtype_under_autocast(dtype: torch.dtype) -> None:
    """Fails if q and k, which RoPE leaves in float32, and v in bfloat16 are refused."""
    q, k, v, _ = (x.transpose(1, 2).to(dtype) for x in qkv(32))
    v = v if dtype == torch.float64 else v.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = lhcp.ContextParallel().sdpa(q, k, v, is_causal=True)
        theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_causal": False}, "is_causal=False: must be True"),
        ({"attn_mask": torch.ones(8, 8)}, "attn_mask is .*: must be None"),
        ({"dropout_p": 0.1}, "dropout_p=0.1: must be 0"),
        ({"enable_gqa": False}, "pass enable_gqa=True"),
        ({"query": torch.ones(1, 4, 1, 16)}, "must have as many tokens"),
        ({"key": torch.ones(1, 8, 16)}, "key is .*: must be .batch, heads, seqlen, head_dim."),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_sdpa_refuses_what_ranks_cannot_do(changes: dict[str, Any], message: str) -> None:
    """Fails if a mask or dropout is dropped without a word."""
    q, k, v, _ = (x.transpose(1, 2) for x in qkv(8, num_kv_heads=2))
    given: dict[str, Any] = {"query": q, "key": k, "value": v, "is_causal": True}
    with pytest.raises(ValueError, match=message):
        lhcp.ContextParallel().sdpa(**given | {"enable_gqa": True} | changes)


def copied(group: Any) -> bool:
    """Whether copies of a model that holds the object attend as it does."""
    cp = lhcp.ContextParallel(group)
    model = Calls(cp)
    x = cp.shard(qkv(32)[0].transpose(1, 2), dim=2)
    copies = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
    return all(torch.equal(model(x), other(x)) for other in copies)


class Calls(nn.Module):
    """A model that was handed the function."""

    def __init__(self, cp: lhcp.ContextParallel) -> None:
        super().__init__()
        self.attend = cp.sdpa

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, x, x, is_causal=True)


def test_a_model_that_holds_it_can_be_copied_and_pickled(ranks: RankPool) -> None:
    """Fails if an average of weights, made by deepcopy, cannot be had for a group's sake."""
    assert copied(None)
    assert ranks.run(copied, 2) == [True, True]


def mesh_mistakes(group: Any) -> list[str]:
    """What the whole mesh is told, on every rank of the pool."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    told = []
    for wrong in (mesh, "cp"):
        try:
            lhcp.ContextParallel(wrong)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            told.append(str(error))
    cp = lhcp.ContextParallel(mesh["cp"])
    both = lhcp.ContextParallel(mesh, rotation="hierarchical")
    return [*told, f"{cp.world_size} {both.world_size} {cp.layout}"]


def test_the_whole_mesh_is_refused(ranks: RankPool) -> None:
    """Fails if dp x cp is taken for nodes x ranks: attention would reach across dp."""
    for whole, name, right in ranks.run(mesh_mistakes, 4):
        assert 'mesh["cp"]' in whole and "('dp', 'cp')" in whole
        assert "must be a ProcessGroup, a DeviceMesh or None" in name
        assert right == "2 4 zigzag"


def test_strata_that_do_not_divide_over_the_ranks_are_refused_where_a_layer_is_made(
    ranks: RankPool,
) -> None:
    """Fails if the error waits for the first forward."""
    for told in ranks.run(layer_of_other_strata, 3):
        assert "num_strata=8: must be a multiple of 6" in told


def layer_of_other_strata(group: Any) -> str:
    try:
        lhcp.ContextParallel(group).attention(CONFIG)
    except ValueError as error:
        return str(error)
    return ""


def there_and_back(group: Any, layout: LayoutName) -> tuple[Tensor, Tensor, int, int]:
    cp = lhcp.ContextParallel(group, layout=layout)
    x = torch.arange(2 * 3 * 13).view(2, 3, 13)
    length = cp.padded_length(13)
    back = cp.unshard(cp.shard(x, dim=2, pad_to=length), dim=2, length=13)
    assert cp.positions(length).shape == (length // cp.world_size,)
    return x, back, length, cp.padded_length(100, CONFIG)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_length_there_and_back(ranks: RankPool, layout: LayoutName) -> None:
    """Fails if the padding is not what is cut off, or is more than is needed."""
    for x, back, length, with_config in ranks.run(there_and_back, 2, layout):
        assert torch.equal(x, back)
        assert length == (16 if layout == "zigzag" else 14)
        assert with_config == CONFIG.padded_length(100)


def test_unshard_to_more_than_there_is() -> None:
    with pytest.raises(ValueError, match="length=9: must be 0 to the 8"):
        lhcp.ContextParallel().unshard(torch.zeros(1, 8), length=9)


def test_positions_are_this_ranks(ranks: RankPool) -> None:
    parts = ranks.run(positions_of, 2)
    assert torch.equal(together(parts, "zigzag", 0), torch.arange(16))


def positions_of(group: Any) -> Tensor:
    return lhcp.ContextParallel(group).positions(16)
