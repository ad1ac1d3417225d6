"""The bytes of files as one array, and which of them are held out."""

import os
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from pathlib import Path

import numpy as np

from lhcp.training.files import Manifest, TextFile


@dataclass(frozen=True)
class Piece:
    """`length` bytes of one file from `start`."""

    path: Path
    start: int
    length: int


class Corpus:
    """The pieces of files as one long array of bytes, read from disk where it is asked for."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = tuple(pieces)
        self._ends = list(accumulate(piece.length for piece in self.pieces))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def begins(self, start: int, stop: int) -> list[int]:
        """Return where a piece begins, from `start` on and before `stop`."""
        ends = self._ends[bisect_left(self._ends, start) : bisect_left(self._ends, stop)]
        return [0, *ends] if start <= 0 < stop else ends

    def read(self, start: int, count: int) -> np.ndarray:
        """Return `count` bytes from `start` as uint8 [count].

        Raises:
            RuntimeError: a file became shorter since the corpus was opened.
        """
        parts = []
        index = bisect_right(self._ends, start)
        while count:
            piece = self.pieces[index]
            skip = start - (self._ends[index] - piece.length)
            take = min(count, piece.length - skip)
            part = np.fromfile(piece.path, np.uint8, count=take, offset=piece.start + skip)
            if part.size < take:
                raise RuntimeError(f"{piece.path} became shorter during the run: restore it")
            parts.append(part)
            start, count, index = start + take, count - take, index + 1
        return np.concatenate(parts)


def draw_files(manifest: Manifest, share: float) -> set[TextFile] | None:
    """Return files of about `share` of all bytes, or None where whole files miss it by a fifth.

    The draw is by name alone, so that it looks like the rest and is the same everywhere.
    """
    wanted = share * sum(file.size for file in manifest.files)
    chosen, left = set(), wanted
    order = sorted(manifest.files, key=lambda f: (sha256(os.fsencode(f.name)).digest(), f.name))
    for file in order:
        if 0 < file.size <= left:
            chosen.add(file)
            left -= file.size
    return chosen if left <= wanted / 5 else None


def cut_end(manifest: Manifest, border: int) -> list[tuple[bool, Piece]]:
    """Return (whether held out, piece) of the text cut after `border` bytes."""
    pieces = []
    for file in manifest.files:
        head = min(file.size, max(border, 0))
        border -= file.size
        if head:
            pieces.append((False, Piece(file.path, 0, head)))
        if head < file.size:
            pieces.append((True, Piece(file.path, head, file.size - head)))
    return pieces
