"""The fused merge of two partial attentions against the merge in float64."""

import pytest
import torch

from lhcp.ring.merge import merge
from lhcp.ring.merge_kernel import merge_fused
from tests.kernels.cases import DEVICE, assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def parts(seqlen: int, head_dim: int) -> tuple[torch.Tensor, ...]:
    """Two attentions (out, lse) of two batch rows and three heads; their lse differ widely."""
    rows = [torch.randn(2, seqlen, 3, head_dim, device=DEVICE) for _ in range(2)]
    lse = [torch.randn(2, 3, seqlen, device=DEVICE) * 10 for _ in range(2)]
    return rows[0], lse[0], rows[1], lse[1]


def exact_merge(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, block_out, block_lse = (x.double() for x in tensors)
    merge(out, lse, block_out, block_lse)
    return out, lse


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seqlen, head_dim", [(33, 64), (7, 40)])
def test_equals_merge_in_float64(seqlen, head_dim, dtype):
    out, lse, block_out, block_lse = parts(seqlen, head_dim)
    out, block_out = out.to(dtype), block_out.to(dtype)
    want, want_lse = exact_merge(out, lse, block_out, block_lse)
    merge_fused(out, lse, block_out, block_lse)
    assert_close(out, want, dtype)
    assert_close(lse, want_lse, torch.float32)


def test_wide_sum_of_a_narrow_block_in_views():
    """What the ring does: rows of one chunk and one head group of a float32 sum."""
    whole, whole_lse, block_out, block_lse = parts(24, 16)
    block_out = block_out[:, 8:, :2].bfloat16()
    out, lse, block_lse = whole[:, 8:, :2], whole_lse[:, :2, 8:], block_lse[:, :2, 8:]
    before = whole.clone(), whole_lse.clone()
    want, want_lse = exact_merge(out, lse, block_out, block_lse)
    merge_fused(out, lse, block_out, block_lse)
    assert_close(out, want, torch.float32)
    assert_close(lse, want_lse, torch.float32)
    assert torch.equal(whole[:, :8], before[0][:, :8])
    assert torch.equal(whole[:, :, 2], before[0][:, :, 2])
    assert torch.equal(whole_lse[..., :8], before[1][..., :8])


def test_extremes():
    """A block that weighs nothing changes nothing; equal blocks are averaged."""
    out, lse, block_out, _ = parts(5, 16)
    alone = out.clone(), lse.clone()
    merge_fused(out, lse, block_out, lse - 1e4)
    assert torch.equal(out, alone[0]) and torch.equal(lse, alone[1])
    merge_fused(out, lse, block_out, lse.clone())
    assert_close(out, (alone[0].double() + block_out) / 2, torch.float32)
