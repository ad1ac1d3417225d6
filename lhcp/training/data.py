"""Text files as bytes, cut into sequences in an order that is a pure function of seed and step."""

import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lhcp.training.files import Manifest, TextFile, find_files, read_manifest, standard_library
from lhcp.training.passkey import is_passkey, training_sequence


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text to train on, and how much of it to hold out."""

    text: tuple[str, ...] = ()
    """Paths or globs (`**` goes into folders); none: the Python standard library's own sources."""
    heldout: float = 0.05
    """Share of the text's bytes that is never trained on, strictly between 0 and 1."""
    passkey: float = 0.0
    """Share of the training sequences that are passkey text (`lhcp.training.passkey`), 0 to 1. The
    held-out text has none."""

    def __post_init__(self) -> None:
        if not 0 < self.heldout < 1:
            raise ValueError(f"heldout={self.heldout}: must lie between 0 and 1, for example 0.05")
        if not 0 <= self.passkey <= 1:
            raise ValueError(f"passkey={self.passkey}: must lie in 0 to 1, for example 0.25")


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


def open_corpus(config: DataConfig) -> tuple[Corpus, Corpus, Manifest]:
    """Return the training part, the held-out part and the manifest; no byte is in both parts.

    Files are held out whole, drawn by their names, as long as they fit into the held-out share of
    all bytes. Where files are too few or too large for that, the end of the text is held out.

    Raises:
        FileNotFoundError: a pattern names no file.
        ValueError: there is no text.
    """
    manifest = read_manifest(find_files(config.text) if config.text else standard_library())
    total = sum(file.size for file in manifest.files)
    if not total:
        named = ", ".join(config.text) or "the Python standard library (no .py files are installed)"
        raise ValueError(f"data.text: no text in {named}; name files with --data.text")
    chosen = draw_files(manifest, config.heldout)
    if chosen is not None:
        pieces = [(f in chosen, Piece(f.path, 0, f.size)) for f in manifest.files if f.size]
    else:
        pieces = cut_end(manifest, round(total * (1 - config.heldout)))
    train, heldout = (Corpus([p for out, p in pieces if out is part]) for part in (False, True))
    return train, heldout, manifest


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


class Sequences:
    """The sequences of `seqlen` tokens of a corpus, in an order that depends on `seed` alone.

    Sequence g of the run is number g % count of epoch g // count; every epoch draws its own order
    and its own start. So any step of any rank can be read without those before it.

    Args:
        corpus: The text.
        seqlen: N, tokens of a sequence.
        seed: Of the order.
        part: What errors call it.
        passkey: Share of sequences that are passkey text instead; the others stay as they are.

    Raises:
        ValueError: the corpus is shorter than one sequence and the byte after it.
    """

    def __init__(
        self,
        corpus: Corpus,
        seqlen: int,
        seed: int,
        part: str = "training",
        *,
        passkey: float = 0.0,
    ) -> None:
        if len(corpus) <= seqlen:
            raise ValueError(
                f"the {part} text has {len(corpus)} bytes, seqlen={seqlen} needs at least "
                f"{seqlen + 1}: name more text with --data.text, shorten --seqlen"
                + (", or raise --data.heldout" if part == "held-out" else "")
            )
        self.corpus, self.seqlen, self.seed, self.passkey = corpus, seqlen, seed, passkey
        self.count = (len(corpus) - 1) // seqlen
        self._epoch, self._start, self._order = -1, 0, np.empty(0, np.int64)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return sequence `index` of the run, uint8 [seqlen + 1]."""
        if self.passkey and is_passkey(self.seed, index, self.passkey):
            return training_sequence(self.seed, index, self.seqlen)
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


@dataclass(frozen=True)
class TrainingData:
    """The text of a run: what it trains on, what it never sees, and the files that both are of."""

    train: Sequences
    heldout: Sequences
    manifest: Manifest


def open_data(config: DataConfig, seqlen: int, seed: int) -> TrainingData:
    """Return the data of a run; every rank that calls it with the same files gets the same.

    Raises:
        FileNotFoundError: a pattern names no file.
        ValueError: there is no text, or a part of it is shorter than a sequence.
    """
    train, heldout, manifest = open_corpus(config)
    return TrainingData(
        Sequences(train, seqlen, seed, passkey=config.passkey),
        Sequences(heldout, seqlen, seed, "held-out"),
        manifest,
    )
