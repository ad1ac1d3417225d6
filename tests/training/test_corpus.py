"""A corpus reads across files, and notices one that became shorter."""

from pathlib import Path

import pytest

from lhcp.training.corpus import Corpus, Piece


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
