"""The fused merge of partial attentions, and the sum of partial gradients, against float64."""

import pytest
import torch

from lhcp.ring.merge import add, merge
from lhcp.ring.merge_kernel import add_fused, merge_fused
from tests.kernels.cases import DEVICE, assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(num, seqlen, head_dim, dtype=torch.float32):
    """Attentions (out, lse) of two batch rows and three heads; their lse differ widely."""
    outs = [torch.randn(2, seqlen, 3, head_dim, device=DEVICE).to(dtype) for _ in range(num)]
    return outs, [torch.randn(2, 3, seqlen, device=DEVICE) * 10 for _ in range(num)]


def exact_merge(outs, lses):
    outs, lses = ([x.double() for x in tensors] for tensors in (outs, lses))
    out, lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
    merge(out, lse, outs, lses)
    return out, lse


def poisoned(like, dtype=None):
    return torch.full_like(like, torch.nan, dtype=dtype or like.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num, seqlen, head_dim", [(2, 33, 64), (5, 7, 40)])
def test_merge_equals_float64(num, seqlen, head_dim, dtype):
    """Fails if a part is lost or weighed wrongly, or rows past the end are read."""
    outs, lses = draw(num, seqlen, head_dim, dtype)
    want, want_lse = exact_merge(outs, lses)
    out, lse = poisoned(outs[0]), poisoned(lses[0])
    merge_fused(out, lse, outs, lses)
    assert_close(out, want, dtype)
    assert_close(lse, want_lse, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_equals_float64(dtype):
    """Fails if a part is lost, or the sum is rounded at every part."""
    parts, _ = draw(4, 33, 40, dtype)
    want = sum(x.double() for x in parts)
    out = poisoned(parts[0])
    add_fused(out, parts)
    assert_close(out, want, dtype)
    exact = poisoned(parts[0], torch.float64)
    add(exact, [x.double() for x in parts])
    assert_close(exact, want, torch.float64)


def test_views_and_dtypes_mix_and_the_whole_may_be_a_part():
    """What the ring does: rows of a wide sum and a narrow block, into the wide sum."""
    (whole, block), (whole_lse, block_lse) = draw(2, 24, 16)
    block = block[:, 8:, :2].bfloat16()
    out, lse, block_lse = whole[:, 8:, :2], whole_lse[:, :2, 8:], block_lse[:, :2, 8:]
    before = whole.clone(), whole_lse.clone()
    want, want_lse = exact_merge((out, block), (lse, block_lse))
    merge_fused(out, lse, (out, block), (lse, block_lse))
    assert_close(out, want, torch.float32)
    assert_close(lse, want_lse, torch.float32)
    want = out.double() + block.double()
    add_fused(out, (out, block))
    assert_close(out, want, torch.float32)
    assert torch.equal(whole[:, :8], before[0][:, :8])
    assert torch.equal(whole[:, :, 2], before[0][:, :, 2])
    assert torch.equal(whole_lse[..., :8], before[1][..., :8])


def test_extremes():
    """A block that weighs nothing changes nothing; equal blocks are averaged."""
    (alone, block), (lse, _) = draw(2, 5, 16)
    out, total = poisoned(alone), poisoned(lse)
    merge_fused(out, total, (alone, block), (lse, lse - 1e4))
    assert torch.equal(out, alone) and torch.equal(total, lse)
    merge_fused(out, total, (alone, block), (lse, lse))
    assert_close(out, (alone.double() + block) / 2, torch.float32)
