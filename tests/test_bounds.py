"""Bounds of documents come back from ids, from positions and from Hugging Face's."""

import pytest
import torch

import lhcp
from tests.test_documents import random_cuts


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
