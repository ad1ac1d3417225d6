"""Data: the order is a pure function, ranks divide it, the held-out part is never trained on."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from lhcp.training.data import Corpus, DataConfig, Piece, Sequences, open_corpus
from lhcp.training.files import find_files


def write(folder: Path, *texts: bytes) -> DataConfig:
    for index, text in enumerate(texts):
        (folder / f"{index:03d}.txt").write_bytes(text)
    return DataConfig(text=(str(folder / "*.txt"),), heldout=0.25)


def test_read_crosses_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"012345")
    (tmp_path / "b").write_bytes(b"abcdef")
    corpus = Corpus([Piece(tmp_path / "a", 2, 3), Piece(tmp_path / "b", 0, 6)])
    whole = b"234abcdef"
    assert len(corpus) == len(whole)
    for start in range(len(whole)):
        for stop in range(start + 1, len(whole) + 1):
            assert corpus.read(start, stop - start).tobytes() == whole[start:stop]


def test_shrunk_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"01")
    with pytest.raises(RuntimeError, match="shorter during the run"):
        Corpus([Piece(tmp_path / "a", 0, 6)]).read(0, 6)


@pytest.mark.parametrize("num_files", [1, 2, 40], ids=["one", "two", "many"])
def test_heldout_never_overlaps(tmp_path: Path, num_files: int) -> None:
    texts = [bytes([33 + i]) * (10 + i) for i in range(num_files)]
    train, heldout, _ = open_corpus(write(tmp_path, *texts))
    taken = [
        (p.path, p.start + i)
        for part in (train, heldout)
        for p in part.pieces
        for i in range(p.length)
    ]
    assert len(taken) == len(set(taken)) == sum(map(len, texts))
    assert 0.1 < len(heldout) / (len(heldout) + len(train)) < 0.4


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


def test_standard_library_is_the_default() -> None:
    train, heldout, _ = open_corpus(DataConfig())
    assert len(train) > 5_000_000 and len(heldout) > 200_000
    assert not {p.path for p in train.pieces} & {p.path for p in heldout.pieces}


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{0}/none*.txt", FileNotFoundError, "names no file; check the path"),
        ("{0}", FileNotFoundError, "it is a folder; try '{0}/**/*.txt'"),
        ("{0}/empty", ValueError, "no text in"),
    ],
)
def test_missing_text(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(error, match=re.escape(message.format(tmp_path))):
        open_corpus(DataConfig(text=(text.format(tmp_path),)))


def test_too_short_text(tmp_path: Path) -> None:
    corpus, heldout, _ = open_corpus(write(tmp_path, b"x" * 100))
    with pytest.raises(
        ValueError, match=r"training text has 75 bytes, seqlen=75 needs at least 76"
    ):
        Sequences(corpus, 75, 0)
    with pytest.raises(ValueError, match=r"raise --data\.heldout"):
        Sequences(heldout, 75, 0, "held-out")


def test_heldout_share_is_checked() -> None:
    with pytest.raises(ValueError, match="heldout=1"):
        DataConfig(heldout=1)


def names_of(*patterns: Path | str) -> list[str]:
    return [path.name for path in find_files([str(pattern) for pattern in patterns])]


def test_a_path_that_is_there_is_no_pattern(tmp_path: Path) -> None:
    """Fails if another file is trained on than the one that is named."""
    (tmp_path / "vol1.txt").write_bytes(b"other")
    (tmp_path / "vol[1].txt").write_bytes(b"named")
    assert names_of(tmp_path / "vol[1].txt") == ["vol[1].txt"]
    assert names_of(tmp_path / "vol*.txt") == ["vol1.txt", "vol[1].txt"]
    folder = tmp_path / "a[1]"
    folder.mkdir()
    (folder / "x.txt").write_bytes(b"inside")
    with pytest.raises(FileNotFoundError, match="it is a folder; try") as said:
        names_of(folder)
    (advice,) = re.findall(r"try '(.*)'", str(said.value))
    assert names_of(advice) == ["x.txt"]


def test_a_file_of_many_names_is_read_once(tmp_path: Path) -> None:
    """Fails if the same bytes may be trained on and held out, because a link leads to them."""
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "x.txt").write_bytes(b"bytes")
    (folder / "soft.txt").symlink_to(folder / "x.txt")
    (folder / "hard.txt").hardlink_to(folder / "x.txt")
    (folder / "loop").symlink_to(folder)
    (folder / "other.txt").write_bytes(b"bytes")
    found = names_of(tmp_path / "**/*.txt", folder / ".." / "a" / "x.txt")
    assert found == ["other.txt", "x.txt"]
    train, heldout, _ = open_corpus(DataConfig(text=(str(tmp_path / "**/*.txt"),), heldout=0.5))
    assert len(train) + len(heldout) == 10


@pytest.mark.parametrize("share", [0.05, 0.4, 0.6, 0.9])
@pytest.mark.parametrize("sizes", ["even", "one large", "few", "two large"])
def test_the_held_out_share_is_of_bytes(tmp_path: Path, share: float, sizes: str) -> None:
    """Fails if files are counted: one large file among many, or a share above a half."""
    of = {
        "even": [500] * 200,
        "one large": [100] * 39 + [39_000],
        "few": [1000, 2000, 3000],
        "two large": [40_000, 50, 30, 60_000],
    }
    for index, size in enumerate(of[sizes]):
        (tmp_path / f"{index:03d}.txt").write_bytes(b"x" * size)
    config = DataConfig(text=(str(tmp_path / "*.txt"),), heldout=share)
    train, heldout, _ = open_corpus(config)
    assert len(train) + len(heldout) == sum(of[sizes])
    assert 0.8 * share <= len(heldout) / sum(of[sizes]) <= 1.001 * share
    ranges = [(p.path, p.start, p.length) for c in (train, heldout) for p in c.pieces]
    assert len(set(ranges)) == len(ranges)
