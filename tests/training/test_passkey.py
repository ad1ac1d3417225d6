"""Passkey text: what it holds, and that it is a function of seed and index alone."""

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from lhcp.training.corpus import Corpus, Piece
from lhcp.training.data import DataConfig, open_data
from lhcp.training.passkey import FILLER, MARK, NEAREST, asked_at, training_sequence
from lhcp.training.sequences import Sequences

MENTION = re.compile(re.escape(MARK) + rb"(\d)")


@pytest.mark.parametrize("seqlen", [18, 63, 256, 1000])
def test_a_training_sequence_asks_for_what_it_said(seqlen: int) -> None:
    """Fails if a last question has no answer before it, or mentions have two digits or overlap."""
    for index in range(300):
        text = training_sequence(3, index, seqlen)
        assert text.dtype == np.uint8 and text.shape == (seqlen + 1,)
        found = list(MENTION.finditer(bytes(text)))
        assert len(found) >= 2 and found[-1].end() == seqlen + 1
        assert len({match[1] for match in found}) == 1
        starts = [match.start() for match in found]
        assert all(b - a >= NEAREST for a, b in pairwise(starts))
        assert set(MENTION.sub(b"", bytes(text))) <= set(FILLER)


def test_digits_and_distances_are_spread() -> None:
    """Fails if a digit, a far answer or a near one is hardly ever trained."""
    texts = [bytes(training_sequence(0, index, 512)) for index in range(400)]
    counts = [sum(text[-1:] == b"%d" % digit for text in texts) for digit in range(10)]
    assert min(counts) > 15
    starts = [[m.start() for m in MENTION.finditer(text)] for text in texts]
    last = np.array([row[-1] - row[-2] for row in starts])
    assert (last > 256).mean() > 0.05 and (last < 16).mean() > 0.2


def test_a_text_is_a_function_of_its_arguments() -> None:
    """Fails if a text depends on those drawn before, or two of them are one."""
    a, b = training_sequence(0, 5, 256), training_sequence(0, 5, 256)
    assert np.array_equal(a, b)
    others = [training_sequence(0, 6, 256), training_sequence(1, 5, 256)]
    assert not any(np.array_equal(a, other) for other in others)
    asked = {bytes(asked_at(0, depth, trial, 64)[0]) for depth in (0, 0.5, 1) for trial in (0, 1)}
    assert len(asked) == 6


@pytest.mark.parametrize("context", [18, 64, 257])
@pytest.mark.parametrize("depth", [0, 0.1, 0.5, 1])
def test_a_question_has_one_key_at_its_depth(context: int, depth: float) -> None:
    """Fails if the key is elsewhere, is there twice, or is not the digit that is asked for."""
    for trial in range(20):
        text, digit = asked_at(1, depth, trial, context)
        (key,) = MENTION.finditer(bytes(text))
        assert int(key[1]) == digit and len(text) == context
        assert bytes(text).endswith(MARK) and bytes(text).count(MARK) == 2
        assert key.start() == round(depth * (context - 2 - NEAREST))


@pytest.mark.parametrize(
    ("depth", "context", "message"),
    [(1.1, 64, r"depth=1.1: must lie in 0 to 1"), (0.5, 10, "10 bytes: must have at least 18")],
)
def test_what_cannot_be_asked_is_named(depth: float, context: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        asked_at(0, depth, 0, context)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    path = tmp_path / "text"
    path.write_bytes(bytes(range(65, 91)) * 200)
    return Corpus([Piece(path, 0, path.stat().st_size)])


def is_key(row: np.ndarray) -> bool:
    return bytes(row).count(MARK) > 0


def test_the_share_of_a_mix_is_kept_and_the_rest_stays(corpus: Corpus) -> None:
    """Fails if passkey text moves, or takes the place of more or less text than asked."""
    plain = Sequences(corpus, 64, seed=0)
    mixed = Sequences(corpus, 64, seed=0, passkey=0.25)
    rows = [(plain[i], mixed[i]) for i in range(400)]
    found = [is_key(row) for _, row in rows]
    assert 70 < sum(found) < 130
    assert all(np.array_equal(a, b) for (a, b), key in zip(rows, found, strict=True) if not key)
    more = Sequences(corpus, 64, seed=0, passkey=0.5)
    # So that a larger share adds to what a smaller one has.
    assert all(is_key(more[i]) for i, key in enumerate(found) if key)
    assert all(is_key(Sequences(corpus, 64, seed=0, passkey=1.0)[i]) for i in range(20))


def test_a_step_is_the_same_on_any_mesh(corpus: Corpus) -> None:
    """Fails if which sequences are passkey text depends on the ranks that read them."""
    mixed = Sequences(corpus, 64, seed=0, passkey=0.5)
    whole = mixed.batch(3, 0, 1, 4).tokens
    parts = [mixed.batch(3, rank, 2, 4)[0] for rank in range(2)]
    assert whole.tolist() == [row for part in parts for row in part.tolist()]


def test_heldout_text_has_no_passkeys(tmp_path: Path) -> None:
    """Fails if a held-out loss cannot be compared between mixes."""
    path = tmp_path / "text"
    path.write_bytes(bytes(range(65, 91)) * 200)
    data = open_data(DataConfig(text=(str(path),), heldout=0.2, passkey=1.0), 64, 0)
    assert is_key(data.train[0])
    assert not any(is_key(data.heldout[i]) for i in range(10))


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_wrong_share_is_named(share: float) -> None:
    with pytest.raises(ValueError, match=f"passkey={share}: must lie in 0 to 1"):
        DataConfig(passkey=share)
