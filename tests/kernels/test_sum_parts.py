"""The sum of parts by kernel against plain torch: each part once, in its chunk, rounded once."""

import pytest
import torch

from lhcp.ring.kv import KV
from lhcp.ring.merge import sum_parts
from lhcp.ring.merge.sum_kernel import sum_fused
from tests.kernels.cases import DEVICE


@pytest.mark.parametrize("before", [0, 5], ids=["whole", "last"])
@pytest.mark.parametrize("with_own", [True, False], ids=["own", "parts"])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "sources, first, slots, tokens, heads, head_dim",
    [(5, 3, 2, 6, 2, 8), (4, 4, 1, 130, 3, 40), (3, 0, 2, 7, 1, 96), (0, 0, 2, 5, 2, 16)],
)
def test_every_part_is_summed_once(
    sources, first, slots, tokens, heads, head_dim, out_dtype, with_own, before
):
    """Fails if a part goes to another chunk, or to rows before its own, is left out, or a sum is
    rounded on the way."""
    batch, parts_dtype, chunk = 2, torch.bfloat16, before + tokens
    shape = (2, sources, batch, tokens, heads, head_dim)
    parts = torch.randn(shape, device=DEVICE).to(parts_dtype)
    # Slices of more heads, as a group of heads has them.
    whole = torch.randn(2, batch, slots * chunk, heads + 2, head_dim, device=DEVICE)
    own = KV(*whole.to(parts_dtype)[:, :, :, 1 : heads + 1]) if with_own else None
    out = torch.full_like(whole, torch.nan, dtype=out_dtype)
    sum_fused(parts, first, own, KV(*out[:, :, :, 1 : heads + 1]), chunk)
    exact = torch.zeros(2, batch, slots * chunk, heads, head_dim, dtype=torch.float64)
    for source in range(sources):
        slot = int(source >= first)
        at = slice((slot + 1) * chunk - tokens, (slot + 1) * chunk)
        exact[:, :, at] += parts[:, source].double().cpu()
    if own is not None:
        exact += torch.stack(own).double().cpu()
    got = out[:, :, :, 1 : heads + 1].double().cpu()
    untouched = got.unflatten(2, (slots, chunk))[:, :, :, :before]
    assert untouched.isnan().all()
    exact.unflatten(2, (slots, chunk))[:, :, :, :before] = 0
    untouched.zero_()
    assert out[:, :, :, 0].isnan().all() and out[:, :, :, -1].isnan().all()
    eps = torch.finfo(out_dtype).eps
    assert ((got - exact).abs() <= eps * exact.abs() + 1e-6).all()


def test_the_torch_path_gives_the_same():
    """Fails if a CPU's gradients would differ from a GPU's by more than the order of a sum."""
    parts = torch.randn(2, 4, 1, 8, 2, 16)
    own, ours = KV(*torch.randn(2, 1, 16, 2, 16)), KV(*torch.empty(2, 1, 16, 2, 16))
    sum_parts.sum_parts(parts, 3, own, ours, 8)
    kernel = ours.map(lambda x: torch.empty_like(x, device=DEVICE))
    sum_fused(parts.to(DEVICE), 3, own.map(lambda x: x.to(DEVICE)), kernel, 8)
    for a, b in zip(ours, kernel, strict=True):
        torch.testing.assert_close(a, b.cpu(), atol=1e-6, rtol=1e-6)


def test_own_gradients_may_be_where_sums_go():
    """Fails if rows without parts are lost, or last ones are summed twice, by kernel or torch."""
    parts = torch.randn(2, 3, 2, 3, 2, 16)
    own = KV(*torch.randn(2, 2, 16, 2, 16))
    want = own.map(lambda x: x.clone())
    for kind, x in enumerate(want):
        x[:, 5:8] += parts[kind, :2].sum(0)
        x[:, 13:16] += parts[kind, 2:].sum(0)
    on_device = own.map(lambda x: x.to(DEVICE).clone())
    sum_fused(parts.to(DEVICE), 2, on_device, on_device, 8)
    sum_parts.sum_parts(parts, 2, own, own, 8)
    for a, b, c in zip(want, own, on_device, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c.cpu())


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 1, 3, 2)], ids=["heads apart", "D apart"])
def test_own_gradients_may_lie_in_any_order(order):
    """Fails if rows are mixed where a block returns heads apart, as plain torch does on a GPU."""
    parts = torch.randn(2, 3, 2, 8, 3, 16, device=DEVICE)
    own = KV(*torch.randn(2, 2, 16, 3, 16, device=DEVICE))
    apart = own.map(lambda x: x.permute(order).contiguous().permute(order))
    assert not apart.k.is_contiguous() and torch.equal(apart.k, own.k)
    want, got = (own.map(torch.empty_like) for _ in range(2))
    sum_fused(parts, 2, own, want, 8)
    sum_fused(parts, 2, apart, got, 8)
    assert torch.equal(got.k, want.k) and torch.equal(got.v, want.v)
