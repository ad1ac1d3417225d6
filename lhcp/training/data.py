"""Text files as bytes, cut into sequences in an order that is a pure function of seed and step."""

import glob
import os
import sysconfig
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text to train on, and how much of it to hold out."""

    text: tuple[str, ...] = ()
    """Paths or globs (`**` goes into folders); none: the Python standard library's own sources."""
    heldout: float = 0.05
    """Share of the text that is never trained on, strictly between 0 and 1."""

    def __post_init__(self) -> None:
        if not 0 < self.heldout < 1:
            raise ValueError(f"heldout={self.heldout}: must lie between 0 and 1, for example 0.05")


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


def standard_library() -> list[Path]:
    """Return the sources of Python's standard library, without tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    found = (
        path for path in root.rglob("*.py") if skipped.isdisjoint(path.relative_to(root).parts)
    )
    return sorted(found)


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Return the files that the paths and globs name, sorted, each once whatever it is called.

    A path that is there is taken as it is, also where it reads like a glob. Links, hard links and
    ways through other folders lead to one file: its shortest name stands for it.

    Raises:
        FileNotFoundError: a pattern names no file.
    """
    files: dict[tuple[int, int], Path] = {}
    for pattern in patterns:
        literal = os.path.lexists(pattern)
        found = [pattern] if literal else glob.glob(pattern, recursive=True)
        named = [Path(p) for p in found if Path(p).is_file()]
        if not named:
            inside = f"{glob.escape(pattern.rstrip('/'))}/**/*.txt"
            hint = f"it is a folder; try '{inside}'" if Path(pattern).is_dir() else "check the path"
            raise FileNotFoundError(f"data.text: {pattern!r} names no file; {hint}")
        for path in named:
            about = path.stat()
            known = files.setdefault((about.st_dev, about.st_ino), path)
            if (len(str(path)), path) < (len(str(known)), known):
                files[about.st_dev, about.st_ino] = path
    return sorted(files.values())


def open_corpus(config: DataConfig) -> tuple[Corpus, Corpus]:
    """Return the training part and the held-out part; no byte is in both.

    With enough files every so-many-th one is held out whole, so that both parts look alike; with
    few, the end of the text is.

    Raises:
        FileNotFoundError: a pattern names no file.
        ValueError: there is no text.
    """
    files = find_files(config.text) if config.text else standard_library()
    pieces = [Piece(path, 0, size) for path in files if (size := path.stat().st_size)]
    if not pieces:
        named = ", ".join(config.text) or "the Python standard library (no .py files are installed)"
        raise ValueError(f"data.text: no text in {named}; name files with --data.text")
    every = max(round(1 / config.heldout), 2)
    if len(pieces) >= 2 * every:
        heldout = pieces[every - 1 :: every]
        return Corpus([p for i, p in enumerate(pieces) if i % every != every - 1]), Corpus(heldout)
    border = round(sum(piece.length for piece in pieces) * (1 - config.heldout))
    train, tail = [], []
    for piece in pieces:
        head = min(piece.length, max(border, 0))
        border -= piece.length
        if head:
            train.append(Piece(piece.path, 0, head))
        if head < piece.length:
            tail.append(Piece(piece.path, head, piece.length - head))
    return Corpus(train), Corpus(tail)


class Sequences:
    """The sequences of `seqlen` tokens of a corpus, in an order that depends on `seed` alone.

    Sequence g of the run is number g % count of epoch g // count; every epoch draws its own order
    and its own start. So any step of any rank can be read without those before it.

    Raises:
        ValueError: the corpus is shorter than one sequence and the byte after it.
    """

    def __init__(self, corpus: Corpus, seqlen: int, seed: int, part: str = "training") -> None:
        if len(corpus) <= seqlen:
            raise ValueError(
                f"the {part} text has {len(corpus)} bytes, seqlen={seqlen} needs at least "
                f"{seqlen + 1}: name more text with --data.text, shorten --seqlen"
                + (", or raise --data.heldout" if part == "held-out" else "")
            )
        self.corpus, self.seqlen, self.seed = corpus, seqlen, seed
        self.count = (len(corpus) - 1) // seqlen
        self._epoch, self._start, self._order = -1, 0, np.empty(0, np.int64)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return sequence `index` of the run, uint8 [seqlen + 1]."""
        epoch, number = divmod(index, self.count)
        if epoch != self._epoch:
            draw = np.random.default_rng((self.seed, epoch))
            slack = len(self.corpus) - 1 - self.count * self.seqlen
            self._start, self._order = int(draw.integers(slack + 1)), draw.permutation(self.count)
            self._epoch = epoch
        start = self._start + int(self._order[number]) * self.seqlen
        return self.corpus.read(start, self.seqlen + 1)

    def batch(
        self, step: int, dp_rank: int, dp_size: int, global_batch: int
    ) -> tuple[Tensor, Tensor]:
        """Return this data-parallel rank's tokens and next bytes, int64 [global_batch / dp, N].

        All ranks together read sequences step * global_batch and on, whatever their number. Labels
        are shifted here, on the whole sequence, so that sharding cannot lose one at a chunk end.

        Args:
            step: Steps done before this one.
            dp_rank: This rank's number among the `dp_size` that read different sequences.
            dp_size: Divides `global_batch`.
            global_batch: Sequences in one step of the whole run.
        """
        local = global_batch // dp_size
        first = step * global_batch + dp_rank * local
        rows = np.stack([self[first + i] for i in range(local)])
        text = torch.from_numpy(rows).to(torch.int64)
        return text[:, :-1], text[:, 1:]
