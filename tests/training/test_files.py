"""Files of a text: a name names what is there, and each file once."""

import re
from pathlib import Path

import pytest

from lhcp.training.data import DataConfig, open_corpus
from lhcp.training.files import find_files


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
