"""Bounds of documents: read once, refused with a remedy, numbered wherever the sequence is cut."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import lhcp
from lhcp import LighthouseConfig
from lhcp.comm.layout import make_layout
from lhcp.documents import Cut, number_tokens, read_packing
from lhcp.reference_documents import check_documents, documents
from lhcp.testing.inputs import small_config
from tests.cases import LAYOUTS, part_of

CONFIG, SEQLEN = small_config(num_strata=8)


def random_cuts(batch: int, seqlen: int, count: int, seed: int) -> Tensor:
    draw = random.Random(seed)
    cuts = {draw.randrange(batch * seqlen) for _ in range(count)}
    return torch.tensor(sorted({*cuts, *range(0, (batch + 1) * seqlen, seqlen)}), dtype=torch.int32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_rank_s_tokens_have_their_document_and_place(world_size: int, layout: Any) -> None:
    """Fails if a number or a position depends on where the sequence is cut."""
    batch, seqlen = 3, 24
    how = make_layout(layout, world_size)
    for seed in range(5):
        cu_seqlens = random_cuts(batch, seqlen, 9, seed)
        expected = documents(cu_seqlens, batch, seqlen)
        places = torch.cat([torch.arange(n) for n in cu_seqlens.diff()]).view(batch, seqlen)
        packing = read_packing(cu_seqlens, batch, seqlen)
        for rank in range(world_size):
            cut = Cut(batch, seqlen, how.num_chunks, how.chunks(rank))
            numbers, positions, whole, _ = number_tokens(packing.starts, cut, torch.device("cpu"))
            assert numbers.dtype == positions.dtype == torch.int32
            assert torch.equal(numbers.long(), part_of(expected, layout, world_size, rank))
            assert torch.equal(whole[:, 0].long(), expected) and whole.dtype == torch.int32
            assert torch.equal(positions.long(), part_of(places, layout, world_size, rank))


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


def test_bounds_from_ids() -> None:
    ids = torch.tensor([[7, 7, 2, 2, 2, -1], [2, 2, 2, 2, 9, 9]])
    expected = torch.tensor([0, 2, 5, 6, 10, 12], dtype=torch.int32)
    assert torch.equal(lhcp.cu_seqlens_from_document_ids(ids), expected)
    positions = torch.tensor([[0, 1, 0, 1, 2, 0], [4, 5, 6, 7, 0, 1]])
    found = lhcp.cu_seqlens_from_position_ids(positions)
    assert found.dtype == torch.int32 and torch.equal(found, expected)
    assert lhcp.cu_seqlens_from_document_ids(ids[0]).tolist() == [0, 2, 5, 6]
    with pytest.raises(TypeError, match="must be integers"):
        lhcp.cu_seqlens_from_document_ids(ids.float())
    with pytest.raises(ValueError, match=r"must be \[B, N\]"):
        lhcp.cu_seqlens_from_position_ids(ids[None])


def test_bounds_from_hugging_face() -> None:
    """Fails if padding of the bounds, or of the sequence, is lost or becomes an empty document."""
    of = lhcp.cu_seqlens_from_hugging_face
    assert of(torch.tensor([0, 3, 9, 9, 9]), 1, 9).tolist() == [0, 3, 9]
    assert of([0, 3, 9], 1, 12).tolist() == [0, 3, 9, 12]
    found = of(torch.tensor([0, 3, 9], dtype=torch.int32), 2, 6)
    assert found.dtype == torch.int32 and found.tolist() == [0, 3, 6, 9, 12]
    for bad in ([0, 5, 3], [1, 3], [0, 13], []):
        with pytest.raises(ValueError, match="cu_seq_lens_q"):
            of(bad, 1, 12)


@pytest.mark.parametrize("name", ["document_ids", "position_ids"])
def test_ids_of_random_documents_come_back(name: str) -> None:
    for seed in range(5):
        cu_seqlens = random_cuts(3, 16, 12, seed)
        lengths = cu_seqlens.diff()
        ids = torch.arange(len(lengths)).repeat_interleave(lengths)
        if name == "position_ids":
            ids = torch.cat([torch.arange(n) for n in lengths])
        make = getattr(lhcp, f"cu_seqlens_from_{name}")
        assert torch.equal(make(ids.view(3, 16)), cu_seqlens)


def test_positions_restart_in_each_document() -> None:
    cu_seqlens = torch.tensor([0, 3, 8, 9, 16], dtype=torch.int32)
    found = lhcp.positions(8, cu_seqlens=cu_seqlens)
    assert found.dtype == torch.int64
    assert found.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4], [0, 0, 1, 2, 3, 4, 5, 6]]
    with pytest.raises(ValueError, match="must go from 0 to"):
        lhcp.positions(7, cu_seqlens=cu_seqlens)
