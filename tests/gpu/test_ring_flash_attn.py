"""ring-flash-attn as the dense engine, on one NCCL rank, against plain attention in float64."""

import importlib.util

import pytest
import torch
import torch.distributed as dist

from lhcp.integrations.ring_flash_attn import ring_flash_attn
from lhcp.ring.block import BLOCKS, math
from lhcp.ring.block.base import BackwardInputs
from lhcp.ring.kv import KV
from lhcp.ring.shape import CAUSAL
from lhcp.testing.inputs import qkv
from lhcp.testing.tolerance import assert_within_budget


@pytest.fixture
def group():
    if BLOCKS["flash_attn"].missing or importlib.util.find_spec("ring_flash_attn") is None:
        pytest.skip("flash-attn or ring-flash-attn is missing")
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_one_rank_is_causal_attention(group, num_kv_heads):
    *rows, dout = qkv(
        256, num_heads=4, num_kv_heads=num_kv_heads, head_dim=64, device="cuda", seed=3
    )

    def answer(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        q, k, v = (x.bfloat16().to(dtype) for x in rows)
        out, lse = math.forward(q, KV(k, v), CAUSAL, 0.125)
        do = dout.bfloat16().to(dtype)
        return out, lse, *math.backward(BackwardInputs(do, q, KV(k, v), out, lse), CAUSAL, 0.125)

    q, k, v = (x.bfloat16().requires_grad_() for x in rows)
    out, lse = ring_flash_attn(q, k, v, group, 0.125)
    assert not lse.requires_grad
    grads = torch.autograd.grad(out, (q, k, v), dout.bfloat16())
    plain, exact = answer(torch.bfloat16), answer(torch.float64)
    names = ("out", "lse", "dq", "dk", "dv")
    for results in zip(names, (out, lse, *grads), plain, exact, strict=True):
        assert_within_budget(*results)


def test_float32_is_refused():
    x = torch.randn(1, 8, 1, 64, device="cuda")
    with pytest.raises(ValueError, match="bfloat16"):
        ring_flash_attn(x, x, x, None, 0.125)
