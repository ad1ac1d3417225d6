"""Bounds of calls are made once for the documents of a step, and end with them."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import lhcp
from lhcp.ring import documents
from lhcp.testing.inputs import qkv, small_config
from lhcp.testing.ranks import RankPool

CONFIG, SEQLEN = small_config(num_strata=4)


def bounds(*starts: int) -> Tensor:
    return torch.tensor([0, *starts, SEQLEN], dtype=torch.int32)


class Counted:
    """Counts the bounds that are made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[Any] = []
        whole = documents._lay_out

        def lay_out(*args: Any) -> Tensor:
            cut = whole(*args)
            self.made.append(weakref.ref(cut))
            return cut

        monkeypatch.setattr(documents, "_lay_out", lay_out)


def step(layer: lhcp.LighthouseAttention, cu_seqlens: Tensor, group: Any = None) -> list[Tensor]:
    whole = qkv(SEQLEN, num_heads=2, num_kv_heads=2, head_dim=8)
    *leaves, dout = (lhcp.shard(x, group).detach() for x in whole)
    leaves = [x.requires_grad_() for x in leaves]
    out = layer(*leaves, cu_seqlens=cu_seqlens)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def dense(group: Any = None) -> lhcp.LighthouseAttention:
    return lhcp.LighthouseAttention(None, group)


def test_later_layers_and_backwards_make_none(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, cu_seqlens = Counted(monkeypatch), bounds(50, 80)
    first = step(dense(), cu_seqlens)
    assert len(counted.made) == 1
    assert all(map(torch.equal, first, step(dense(), cu_seqlens)))
    assert len(counted.made) == 1


def test_a_selection_s_are_made_once_for_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, cu_seqlens = Counted(monkeypatch), bounds(50, 80)
    layer = lhcp.LighthouseAttention(CONFIG)
    for calls in (1, 2):
        step(layer, cu_seqlens)
        assert len(counted.made) == calls


def test_they_end_with_the_bounds_that_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, cu_seqlens = Counted(monkeypatch), bounds(50, 80)
    step(dense(), cu_seqlens)
    step(lhcp.LighthouseAttention(CONFIG), cu_seqlens)
    gc.collect()
    assert [x() is not None for x in counted.made] == [True, False]
    del cu_seqlens
    gc.collect()
    assert counted.made[0]() is None


def test_others_get_their_own() -> None:
    """Fails if what is kept outlives a change in place, or is found by other documents."""
    layer, changed = dense(), bounds(50, 80)
    fresh = [step(dense(), bounds(50, 80)), step(dense(), bounds(51, 100))]
    got = [step(layer, changed)]
    changed[1], changed[2] = 51, 100
    got.append(step(layer, changed))
    for ours, wanted in zip(got, fresh, strict=True):
        assert all(map(torch.equal, ours, wanted))


def test_made_under_inference_mode_they_serve_training() -> None:
    """Fails if a bound is an inference tensor that autograd refuses to keep."""
    cu_seqlens = bounds(50, 80)
    with torch.inference_mode():
        lhcp.ring_attention(*qkv(SEQLEN, num_heads=2, head_dim=8)[:3], cu_seqlens=cu_seqlens)
    assert all(map(torch.equal, step(dense(), cu_seqlens), step(dense(), bounds(50, 80))))


def again_and_anew(group: Any) -> list[bool]:
    cu_seqlens = bounds(30, 50, 80)
    results = [step(dense(group), x, group) for x in (cu_seqlens, cu_seqlens, cu_seqlens.clone())]
    return [
        torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True)
    ]


def test_across_ranks_what_is_kept_is_what_is_made(ranks: RankPool) -> None:
    """Fails if a call finds the bounds of another of the same pass."""
    assert all(all(same) for same in ranks.run(again_and_anew, 4))
