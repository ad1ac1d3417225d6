"""Bounds of documents: read once, refused with a remedy, checked against the strata."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lhcp import LighthouseConfig
from lhcp.documents import Cut
from lhcp.packing import read_packing
from lhcp.reference_documents import check_documents, documents
from lhcp.testing.inputs import small_config
from tests.test_documents import random_cuts

CONFIG, SEQLEN = small_config(num_strata=8)


def test_bounds_are_read_once_and_again_when_they_change() -> None:
    """Fails if each layer of a step reads them, or a step reads the last one's."""
    cu_seqlens = torch.tensor([0, 3, 8], dtype=torch.int32)
    first = read_packing(cu_seqlens, 1, 8)
    assert read_packing(cu_seqlens, 1, 8) is first
    cut, device = Cut(1, 8, 1, (0,)), torch.device("cpu")
    assert first.local(cut, device) is first.local(cut, device)
    cu_seqlens[1] = 5
    assert read_packing(cu_seqlens, 1, 8).starts.tolist() == [0, 5]


@pytest.mark.parametrize(
    ("bounds", "error", "message"),
    [
        ([0, 8], TypeError, "must be a tensor, got list"),
        (torch.tensor([0.0, 8.0]), TypeError, r"must be torch.int32"),
        (torch.tensor([[0, 8]]), ValueError, r"must be \[num_docs \+ 1\]"),
        (torch.tensor([0]), ValueError, r"must be \[num_docs \+ 1\]"),
        (torch.tensor([1, 8]), ValueError, "from 1 to 8: must go from 0 to 8"),
        (torch.tensor([0, 7]), ValueError, "from 0 to 7: must go from 0 to 8.* padding"),
        (torch.tensor([0, 4, 6, 5, 8]), ValueError, r"\[2:4\] is \[6, 5\]: must ascend"),
        (torch.tensor([0, 4, 4, 8]), ValueError, "leaves empty documents out"),
        (torch.tensor([0, 3, 8]), ValueError, "lacks 4, where row 1 begins"),
    ],
    ids=str,
)
def test_what_are_no_bounds(bounds: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_packing(bounds, 2, 4)


def starts_in(stratum: int, count: int, config: LighthouseConfig, seqlen: int) -> Tensor:
    """Documents that begin in so many windows of level 1 of a stratum."""
    first = stratum * seqlen // config.num_strata
    cuts = {first + i * config.pool_factor for i in range(count)}
    return torch.tensor(sorted({0, *cuts, seqlen}), dtype=torch.int32)


@pytest.mark.parametrize("stratum", [0, 3, 7])
def test_as_many_documents_as_a_stratum_can_expand(stratum: int) -> None:
    """Fails if the limit is off by one, or is not the oracle's."""
    picks = CONFIG.picks
    for count in (picks, picks + 1):
        cu_seqlens = starts_in(stratum, count, CONFIG, SEQLEN)
        packing = read_packing(cu_seqlens, 1, SEQLEN)
        whole = documents(cu_seqlens, 1, SEQLEN)
        if count == picks:
            packing.check_fits(CONFIG, 1)
            check_documents(whole, CONFIG)
            continue
        with pytest.raises(ValueError, match=rf"{count} windows .*stratum {stratum} of row 0"):
            packing.check_fits(CONFIG, 1)
        with pytest.raises(ValueError, match=f"{count} windows"):
            check_documents(whole, CONFIG)


@pytest.mark.parametrize("seed", range(6))
def test_what_the_error_offers_fits(seed: int) -> None:
    """Fails if a remedy breaks another rule."""
    config = LighthouseConfig(num_levels=3, pool_factor=2, topk=32, num_strata=8)
    seqlen = config.min_seqlen * 4
    cu_seqlens = random_cuts(2, seqlen, 14 + seed, seed)
    first = starts_in(2, config.picks + 1, config, seqlen)
    cu_seqlens = torch.cat([cu_seqlens, first]).unique().int()
    packing = read_packing(cu_seqlens, 2, seqlen)
    with pytest.raises(ValueError, match="merge short documents") as caught:
        packing.check_fits(config, 2)
    offers = str(caught.value).split("has an entry: ")[1]
    tried = 0
    for offer in offers.split(" or "):
        name, _, value = offer.partition("=")
        if name in ("topk", "num_strata"):
            fields = {"topk": config.topk, "num_strata": config.num_strata, name: int(value)}
            other = LighthouseConfig(num_levels=3, pool_factor=2, **fields)
            other.check_chunks(2)
            packing.check_fits(other, 2)
            tried += 1
    assert tried >= 1, offers
