"""RoPE after the gather: the oracle's values and gradients on any ranks, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import lhcp
from lhcp import reference
from lhcp.comm.layout import LayoutName
from lhcp.layer.recording import Graphs
from lhcp.testing.inputs import qkv, small_config
from lhcp.testing.ranks import RankPool
from lhcp.training.model import Decoder, ModelConfig, rope_table
from tests.cases import LAYOUTS
from tests.layer.graphs import Again

CONFIG, SEQLEN = small_config(num_strata=8)
HEADS, KV_HEADS = 4, 2


def table(head_dim: int) -> Tensor:
    """What tokens turn by, float64 [N, 2, D / 2]; fast enough that windows smear it."""
    angles = torch.arange(SEQLEN).double()[:, None] * 3.0 ** -torch.arange(head_dim // 2)
    return torch.stack((angles.cos(), angles.sin()), 1)


def oracle() -> list[Tensor]:
    *tensors, do = qkv(SEQLEN, batch=2, num_heads=HEADS, num_kv_heads=KV_HEADS, seed=5)
    leaves = [x.requires_grad_() for x in tensors]
    out = reference.lighthouse_attention(*leaves, config=CONFIG, rope=table(do.shape[-1]))
    return [out.detach(), *torch.autograd.grad(out, leaves, do)]


def ours(group: Any, layout: LayoutName, by_row: bool = False) -> list[Tensor]:
    """Whole output and gradients of a layer on the group's ranks."""
    *tensors, do = qkv(SEQLEN, batch=2, num_heads=HEADS, num_kv_heads=KV_HEADS, seed=5)
    leaves = [lhcp.shard(x, group, layout=layout).requires_grad_() for x in tensors]
    rope = lhcp.shard(table(do.shape[-1]), group, dim=0, layout=layout)
    if by_row:
        rope = rope.expand(do.shape[0], *rope.shape).contiguous()
    layer = lhcp.LighthouseAttention(CONFIG, group, layout=layout)
    out = layer(*leaves, rope=rope)
    grads = torch.autograd.grad(out, leaves, lhcp.shard(do, group, layout=layout))
    return [lhcp.unshard(x.detach(), group, layout=layout) for x in (out, *grads)]


@pytest.mark.parametrize("by_row", [False, True], ids=["positions", "positions by row"])
def test_one_rank_computes_what_the_oracle_says(by_row: bool) -> None:
    """Fails if an entry is turned at another token, or a gradient is not turned back."""
    for mine, right in zip(ours(None, "zigzag", by_row), oracle(), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_compute_what_the_oracle_says(ranks: RankPool, world_size: int) -> None:
    """Fails if entries are turned at local positions."""
    right = oracle()
    for layout in LAYOUTS:
        for mine in ranks.run(ours, world_size, layout):
            for a, b in zip(mine, right, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_what_does_not_fit_is_refused() -> None:
    """Fails if the dense mode leaves q and k raw, or another rank's table is taken."""
    q, k, v, _ = qkv(SEQLEN, num_heads=HEADS, num_kv_heads=KV_HEADS)
    rope, layer = table(q.shape[-1]), lhcp.LighthouseAttention(CONFIG)
    with pytest.raises(ValueError, match=r"rope is \[.*needs"):
        layer(q, k, v, rope=rope[1:])
    layer.mode = "dense"
    with pytest.raises(ValueError, match=r"rope is for lighthouse mode.*turn q and k before"):
        layer(q, k, v, rope=rope)


def test_a_model_differs_in_lighthouse_mode_alone() -> None:
    """Fails if the dense mode, which inference has, is not the same function."""
    before = ModelConfig(
        dim=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        hidden_dim=48,
        dense_layers=(),
    )
    tokens = torch.randint(256, (2, SEQLEN), generator=torch.Generator().manual_seed(1))
    found = {}
    for config in (before, replace(before, rope="after_gather")):
        model = Decoder(config, lambda _: lhcp.LighthouseAttention(CONFIG))
        model.initialize(0)
        for mode in ("lighthouse", "dense"):
            lhcp.set_mode(model, mode)
            found[config.rope, mode] = model(tokens, torch.arange(SEQLEN)).detach()
    assert torch.equal(found["before_pooling", "dense"], found["after_gather", "dense"])
    assert not torch.equal(
        found["before_pooling", "lighthouse"], found["after_gather", "lighthouse"]
    )


def test_a_models_layer_is_given_its_own_positions() -> None:
    """Fails if the model hands over sines of another sign, or turned q and k."""
    config = ModelConfig(
        dim=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=48,
        dense_layers=(), rope="after_gather",
    )  # fmt: skip
    model = Decoder(config, lambda _: lhcp.LighthouseAttention(CONFIG)).double()
    model.initialize(0)
    (block,) = model.blocks
    x = torch.randn(1, SEQLEN, 32, dtype=torch.float64)
    tables = rope_table(torch.arange(SEQLEN), 8, config.rope_theta)
    q, k, v, given = block.attention.qkv(x, *tables)
    right = reference.lighthouse_attention(q, k, v, config=CONFIG, rope=given["rope"])
    torch.testing.assert_close(block.attention.core(q, k, v, **given), right)
    lhcp.set_mode(model, "dense")
    turned_q, turned_k, _, nothing = block.attention.qkv(x, *tables)
    places = torch.arange(SEQLEN).expand(1, 1, -1)
    for raw, turned in ((q, turned_q), (k, turned_k)):
        torch.testing.assert_close(reference.turn_at(raw, given["rope"].double(), places), turned)
    assert nothing == {}


def test_a_graph_is_given_new_angles() -> None:
    """Fails if a replay turns by the angles that it was recorded with."""
    found = []
    for by_graph in (False, True):
        layer = lhcp.LighthouseAttention(CONFIG)
        if by_graph:
            layer.graphs = Graphs(False, recorder=Again())
        for call in range(4):
            *tensors, do = qkv(SEQLEN, num_heads=HEADS, num_kv_heads=KV_HEADS, seed=call)
            leaves = [x.requires_grad_() for x in tensors]
            out = layer(*leaves, rope=table(do.shape[-1]).roll(call, 0))
            found += [out.detach().clone(), *torch.autograd.grad(out, leaves, do)]
    half = len(found) // 2
    assert all(torch.equal(a, b) for a, b in zip(found[:half], found[half:], strict=True))
