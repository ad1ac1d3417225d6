"""Documents: numbered wherever the sequence is cut."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import lhcp
from lhcp.comm.layout import make_layout
from lhcp.documents import Cut, number_tokens
from lhcp.packing import read_packing
from lhcp.reference_documents import documents
from tests.cases import LAYOUTS, part_of


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


def test_positions_restart_in_each_document() -> None:
    cu_seqlens = torch.tensor([0, 3, 8, 9, 16], dtype=torch.int32)
    found = lhcp.positions(8, cu_seqlens=cu_seqlens)
    assert found.dtype == torch.int64
    assert found.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4], [0, 0, 1, 2, 3, 4, 5, 6]]
    with pytest.raises(ValueError, match="must go from 0 to"):
        lhcp.positions(7, cu_seqlens=cu_seqlens)
