"""Digests of files in parts: they see every byte, and know those of older checkpoints."""

import hashlib
from pathlib import Path

import pytest

from lhcp.training.digests import BLOCK, PARTS, digest_of, is_as_written

PART = 2 * BLOCK + 5
SIZE = 2 * PART + 3


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(bytes(i * i % 251 for i in range(1000)) * (SIZE // 1000) + b"rest")
    assert path.stat().st_size > 2 * PART - 1000
    return path


def test_a_digest_of_parts_is_of_their_digests_in_order(file: Path) -> None:
    """Fails if a part is left out, read twice or in the order of threads."""
    data = file.read_bytes()
    parts = [hashlib.sha256(data[i : i + PART]).digest() for i in range(0, len(data), PART)]
    assert digest_of(file, PART) == PARTS + hashlib.sha256(b"".join(parts)).hexdigest()
    assert is_as_written(file, digest_of(file, PART), PART)


@pytest.mark.parametrize("at", [0, BLOCK, PART - 1, PART, -1])
def test_every_byte_counts(file: Path, at: int) -> None:
    """Fails if a turned byte at an edge of a part or of a block goes unseen."""
    before = digest_of(file, PART)
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    assert not is_as_written(file, before, PART)


def test_one_digest_of_all_is_known_still(file: Path) -> None:
    """Fails if a checkpoint of before there were parts is taken for damaged."""
    old = hashlib.sha256(file.read_bytes()).hexdigest()
    assert is_as_written(file, old, PART) and digest_of(file) == old
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert not is_as_written(file, old, PART)
