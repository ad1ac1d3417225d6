"""Partial results of calls: what covers what, and the memory that they may hold."""

import pytest
import torch
from torch import Tensor

from lhcp.ring.merge.deferred import DeferredMerge
from lhcp.ring.shape import DEFAULT_TUNING, Tuning
from lhcp.testing.tolerance import assert_close_float64

SHAPE = (2, 8, 4, 3)
CALLS = [((0, 8), (0, 4)), ((4, 8), (0, 4)), ((0, 4), (0, 2)), ((0, 8), (2, 4))]
"""Rows and heads: all first, then some of them, with edges inside one another."""


def draw(rows: tuple[int, int], heads: tuple[int, int]) -> tuple[Tensor, Tensor]:
    shape = (2, rows[1] - rows[0], heads[1] - heads[0], 3)
    x = torch.randn(shape, dtype=torch.float64)
    return x, torch.randn(shape[0], shape[2], shape[1], dtype=torch.float64)


@pytest.mark.parametrize(
    "held", [(2**28, 32), (0, 32), (2**28, 2)], ids=["held", "few bytes", "few parts"]
)
@pytest.mark.parametrize("weighted", [True, False], ids=["merged", "added"])
def test_queries_are_merged_from_what_covers_them(held: tuple[int, int], weighted: bool) -> None:
    """Fails if a part is merged into rows or heads that are not its own, twice, or never."""
    tuning = Tuning(held_bytes=held[0], held_results=held[1])
    ours = DeferredMerge(torch.empty(SHAPE, dtype=torch.float64), tuning)
    numerator = torch.zeros(SHAPE, dtype=torch.float64)
    weight = torch.zeros(2, 4, 8, dtype=torch.float64)
    for rows, heads in CALLS:
        x, lse = draw(rows, heads)
        ours.add(rows, heads, x, lse if weighted else None)
        at = (slice(None), slice(*rows), slice(*heads))
        share = lse.exp() if weighted else torch.ones_like(lse)
        numerator[at] += x * share.transpose(1, 2)[..., None]
        weight[:, slice(*heads), slice(*rows)] += share
    out, total = ours.result()
    if weighted:
        assert total is not None
        assert_close_float64("lse", total, weight.log())
        numerator /= weight.transpose(1, 2)[..., None]
    assert_close_float64("out", out, numerator)


def test_heads_apart_are_merged_on_the_way() -> None:
    """Fails if heads that have not come yet are more than nothing in a merge of those that have."""
    ours = DeferredMerge(torch.empty(SHAPE, dtype=torch.float64), Tuning(held_bytes=0))
    want = torch.randn(SHAPE, dtype=torch.float64)
    for heads in ((0, 2), (2, 4)):
        ours.add((0, 8), heads, want[:, :, slice(*heads)])
    assert torch.equal(ours.result()[0], want)


def test_one_whole_part_is_not_copied() -> None:
    """Fails if a result that is whole as it comes costs a pass over memory."""
    x, lse = draw((0, 8), (0, 4))
    ours = DeferredMerge(x, DEFAULT_TUNING)
    ours.add((0, 8), (0, 4), x, lse)
    out, total = ours.result()
    assert out.data_ptr() == x.data_ptr() and total is not None
    assert total.data_ptr() == lse.data_ptr()


def test_narrow_parts_are_rounded_once() -> None:
    """Fails if a sum of bfloat16 parts is rounded on the way."""
    parts = torch.randn(7, *SHAPE).bfloat16()
    ours = DeferredMerge(parts[0], DEFAULT_TUNING)
    for part in parts:
        ours.add((0, 8), (0, 4), part)
    exact = parts.double().sum(0)
    eps = torch.finfo(torch.bfloat16).eps
    out = ours.result()[0]
    assert out.dtype == torch.bfloat16
    assert bool(((out.double() - exact).abs() <= 0.51 * eps * exact.abs() + 1e-6).all())
