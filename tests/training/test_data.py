"""Data: which text is there, and that what is held out is never trained on."""

import re
from pathlib import Path

import pytest

from lhcp.training.data import DataConfig, open_corpus


def write(folder: Path, *texts: bytes) -> DataConfig:
    for index, text in enumerate(texts):
        (folder / f"{index:03d}.txt").write_bytes(text)
    return DataConfig(text=(str(folder / "*.txt"),), heldout=0.25)


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


def test_heldout_share_is_checked() -> None:
    with pytest.raises(ValueError, match="heldout=1"):
        DataConfig(heldout=1)


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
