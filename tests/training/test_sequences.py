"""Sequences: the order is a pure function, ranks divide it, labels are the next bytes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lhcp.training.data import open_corpus
from lhcp.training.sequences import Sequences
from tests.training.test_data import write


def test_order_is_a_function_of_seed_and_step(tmp_path: Path) -> None:
    corpus, *_ = open_corpus(write(tmp_path, np.random.default_rng(0).bytes(5000)))
    ordered = [Sequences(corpus, 64, 7).batch(step, 0, 1, 4) for step in range(40)]
    data = Sequences(corpus, 64, 7)
    for step in np.random.default_rng(1).permutation(40).tolist():
        for got, want in zip(data.batch(step, 0, 1, 4)[:2], ordered[step][:2], strict=True):
            assert torch.equal(got, want)
    other = Sequences(corpus, 64, 8).batch(0, 0, 1, 4)[0]
    assert not torch.equal(other, ordered[0][0])


def test_ranks_divide_the_global_batch(tmp_path: Path) -> None:
    corpus, *_ = open_corpus(write(tmp_path, np.random.default_rng(0).bytes(5000)))
    data = Sequences(corpus, 64, 7)
    for step in (0, 3):
        whole = data.batch(step, 0, 1, 4)[0]
        for size in (2, 4):
            parts = [data.batch(step, rank, size, 4)[0] for rank in range(size)]
            assert torch.equal(torch.cat(parts), whole)


def test_an_epoch_reads_every_window_once(tmp_path: Path) -> None:
    corpus, *_ = open_corpus(write(tmp_path, np.random.default_rng(0).bytes(5000)))
    data = Sequences(corpus, 64, 7)
    for epoch in range(2):
        seen = {data[epoch * data.count + i].tobytes() for i in range(data.count)}
        assert len(seen) == data.count


def test_labels_are_the_next_bytes(tmp_path: Path) -> None:
    corpus, *_ = open_corpus(write(tmp_path, bytes(range(256)) * 4))
    tokens, labels, _ = Sequences(corpus, 64, 0).batch(0, 0, 1, 2)
    assert tokens.dtype == labels.dtype == torch.int64
    assert torch.equal((tokens + 1) % 256, labels)


def test_too_short_text(tmp_path: Path) -> None:
    corpus, heldout, _ = open_corpus(write(tmp_path, b"x" * 100))
    with pytest.raises(
        ValueError, match=r"training text has 75 bytes, seqlen=75 needs at least 76"
    ):
        Sequences(corpus, 75, 0)
    with pytest.raises(ValueError, match=r"raise --data\.heldout"):
        Sequences(heldout, 75, 0, "held-out")
