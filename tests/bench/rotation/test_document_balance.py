"""What is counted of packed documents, on documents small enough to count by hand."""

import torch

from bench.rotation.document_balance import count, keys_sent, work_of_chunks
from lhcp.comm.layout import make_layout
from lhcp.ring.shape import CAUSAL, Mask


def test_work_is_pairs_inside_documents() -> None:
    # Documents of 3 and 5 tokens in chunks of 4: queries see 1 2 3 | 1 2 3 4 5 keys.
    assert work_of_chunks(torch.tensor([0, 3]), 8, 2).tolist() == [1 + 2 + 3 + 1, 2 + 3 + 4 + 5]


def test_keys_sent_are_those_that_documents_reach() -> None:
    # Chunks of 6.
    layout = make_layout("zigzag", 4)
    assert keys_sent(layout, 48, CAUSAL) == 18 * 6
    assert keys_sent(layout, 48, Mask(True, 1, 6, 0)) == 0
    # Each chunk but the last is seen by the one after it: on another rank, but for one.
    assert keys_sent(layout, 48, Mask(True, 2, 8, 1)) == 6 * 6
    assert keys_sent(layout, 48, Mask(True, 2, 4, 1)) == 6 * 4


def test_documents_longer_than_the_sequence_are_none() -> None:
    """Fails if work is not shared as without documents where there is one."""
    row = count((1024, 2**20, 4, "zigzag"), draws=2, sigma=0.1)
    assert abs(row.busiest - 1) < 1e-2 and row.sent == 1
