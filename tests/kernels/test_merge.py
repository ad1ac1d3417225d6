"""The fused merge of partial attentions, and the sum of partial gradients, against float64."""

import pytest
import torch

from lhcp.ring.merge.merge import add, merge
from lhcp.ring.merge.merge_kernel import add_fused, merge_fused
from lhcp.ring.merge.partial import Partial
from tests.kernels.cases import DEVICE, assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(num, seqlen, head_dim, dtype=torch.float32):
    """Attentions (out, lse) of two batch rows and three heads; their lse differ widely."""
    outs = [torch.randn(2, seqlen, 3, head_dim, device=DEVICE).to(dtype) for _ in range(num)]
    return outs, [torch.randn(2, 3, seqlen, device=DEVICE) * 10 for _ in range(num)]


def wholes(outs, lses=None):
    lses = [None] * len(outs) if lses is None else lses
    return [Partial.whole(out, lse) for out, lse in zip(outs, lses, strict=True)]


def exact_merge(parts, like):
    """By float64, on whole tensors: what a part does not cover has no weight in it."""
    outs, lses = map(torch.stack, zip(*(widened(part, like) for part in parts), strict=True))
    total = lses.logsumexp(0)
    weights = (lses - total).exp().transpose(2, 3)[..., None]
    return (outs * weights).sum(0), total


def widened(part, like):
    batch, seqlen, heads, _ = like.shape
    out = torch.zeros(like.shape, dtype=torch.float64, device=like.device)
    lse = out.new_full((batch, heads, seqlen), -torch.inf)
    out[:, slice(*part.rows), slice(*part.heads)] = part.x
    if part.lse is not None:
        lse[:, slice(*part.heads), slice(*part.rows)] = part.lse
    return out, lse


def poisoned(like, dtype=None):
    return torch.full_like(like, torch.nan, dtype=dtype or like.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num, seqlen, head_dim", [(2, 33, 64), (5, 7, 40)])
def test_merge_equals_float64(num, seqlen, head_dim, dtype):
    """Fails if a part is lost or weighed wrongly, or rows past the end are read."""
    outs, lses = draw(num, seqlen, head_dim, dtype)
    want, want_lse = exact_merge(wholes(outs, lses), outs[0])
    out, lse = poisoned(outs[0]), poisoned(lses[0])
    merge_fused(out, lse, wholes(outs, lses))
    assert_close(out, want, dtype)
    assert_close(lse, want_lse, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_equals_float64(dtype):
    """Fails if a part is lost, or the sum is rounded at every part."""
    parts, _ = draw(4, 33, 40, dtype)
    want = sum(x.double() for x in parts)
    out = poisoned(parts[0])
    add_fused(out, wholes(parts))
    assert_close(out, want, dtype)
    exact = poisoned(parts[0], torch.float64)
    add(exact, wholes([x.double() for x in parts]))
    assert_close(exact, want, torch.float64)


RUNS = [((0, 40), (0, 3)), ((0, 21), (0, 3)), ((21, 40), (0, 2)), ((5, 33), (1, 3))]
"""Rows and heads; edges in the middle of a kernel's block of rows, and apart from one another."""


@pytest.mark.parametrize("fused", [True, False], ids=["kernel", "torch"])
def test_a_query_is_merged_from_what_covers_it(fused):
    """Fails if a part is read beyond its run, at another run's place, or dtypes do not mix."""
    (whole,), _ = draw(1, 40, 24)
    parts = []
    for (start, stop), (first, last) in RUNS:
        (x,), (lse,) = draw(1, 48, 24, torch.bfloat16 if start else torch.float32)
        x, lse = x[:, 4 : 4 + stop - start, first:last], lse[:, first:last, 4 : 4 + stop - start]
        parts.append(Partial((start, stop), (first, last), x, lse))
    want, want_lse = exact_merge(parts, whole)
    out, lse = poisoned(whole), poisoned(want_lse, torch.float32)
    (merge_fused if fused else merge)(out, lse, parts)
    assert_close(out, want, torch.float32)
    assert_close(lse, want_lse, torch.float32)
    out = poisoned(whole)
    (add_fused if fused else add)(out, parts)
    assert_close(out, sum(widened(part, whole)[0] for part in parts), torch.float32)


@pytest.mark.parametrize("fused", [True, False], ids=["kernel", "torch"])
def test_what_nothing_covers_saw_nothing(fused):
    """Fails if such queries become NaN: results merged on the way may not cover all yet."""
    (x, more), (lse, more_lse) = draw(2, 9, 16)
    lse[:, :, :2] = -torch.inf
    out, total = poisoned(x), poisoned(lse)
    merging = merge_fused if fused else merge
    merging(out, total, [Partial((0, 5), (0, 3), x[:, :5], lse[:, :, :5])])
    assert not out[:, :2].any() and not out[:, 5:].any()
    assert (total[:, :, :2] == -torch.inf).all() and (total[:, :, 5:] == -torch.inf).all()
    assert torch.equal(out[:, 2:5], x[:, 2:5]) and torch.equal(total[:, :, 2:5], lse[:, :, 2:5])
    merging(out, total, wholes((out, more), (total, more_lse)))
    assert torch.equal(out[:, 5:], more[:, 5:]) and torch.equal(out[:, :2], more[:, :2])


@pytest.mark.parametrize("fused", [True, False], ids=["kernel", "torch"])
def test_the_whole_may_be_a_part(fused):
    """Fails if a result is read after it was written."""
    (whole, block), (lse, block_lse) = draw(2, 40, 16)
    parts = [
        Partial.whole(whole, lse),
        Partial((8, 40), (0, 2), block[:, 8:, :2], block_lse[:, :2, 8:]),
    ]
    want, want_lse = exact_merge(parts, whole)
    (merge_fused if fused else merge)(whole, lse, parts)
    assert_close(whole, want, torch.float32)
    assert_close(lse, want_lse, torch.float32)
    want = sum(widened(part, whole)[0] for part in parts)
    (add_fused if fused else add)(whole, parts)
    assert_close(whole, want, torch.float32)


@pytest.mark.parametrize("fused", [True, False], ids=["kernel", "torch"])
def test_what_lies_around_a_view_stays(fused):
    """Fails if results that are views of some rows and heads are written beyond them."""
    (whole, block), (whole_lse, block_lse) = draw(2, 24, 16)
    block = block[:, 8:, :2].bfloat16()
    out, lse, block_lse = whole[:, 8:, :2], whole_lse[:, :2, 8:], block_lse[:, :2, 8:]
    before = whole.clone(), whole_lse.clone()
    parts = wholes((out, block), (lse, block_lse))
    want, want_lse = exact_merge(parts, out)
    (merge_fused if fused else merge)(out, lse, parts)
    assert_close(out, want, torch.float32)
    assert_close(lse, want_lse, torch.float32)
    want = out.double() + block.double()
    (add_fused if fused else add)(out, parts)
    assert_close(out, want, torch.float32)
    assert torch.equal(whole[:, :8], before[0][:, :8])
    assert torch.equal(whole[:, :, 2], before[0][:, :, 2])
    assert torch.equal(whole_lse[..., :8], before[1][..., :8])


def test_extremes():
    """A block that weighs nothing changes nothing; equal blocks are averaged."""
    (alone, block), (lse, _) = draw(2, 5, 16)
    out, total = poisoned(alone), poisoned(lse)
    merge_fused(out, total, wholes((alone, block), (lse, lse - 1e4)))
    assert torch.equal(out, alone) and torch.equal(total, lse)
    merge_fused(out, total, wholes((alone, block), (lse, lse)))
    assert_close(out, (alone.double() + block) / 2, torch.float32)


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 1, 3, 2)], ids=["heads apart", "D apart"])
def test_results_may_lie_in_any_order(order):
    """Fails if a result whose axes lie in memory as another block likes is read as if packed."""
    outs, lses = draw(2, 24, 16)
    want, _ = exact_merge(wholes(outs, lses), outs[0])
    apart = [x.permute(order).contiguous().permute(order) for x in outs]
    out, lse = poisoned(outs[0]), poisoned(lses[0])
    merge_fused(out, lse, wholes(apart, lses))
    assert_close(out, want, torch.float32)
    add_fused(out, wholes(apart))
    assert_close(out, sum(x.double() for x in outs), torch.float32)
