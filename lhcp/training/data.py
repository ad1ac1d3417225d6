"""Text files as bytes, cut into sequences in an order that is a pure function of seed and step."""

import os
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

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
    documents: bool = False
    """Whether each file is a document of its own: attention stays inside it, and its last byte asks
    for none. Else the text runs on from file to file."""
    restart_positions: bool = False
    """Whether positions begin at 0 in each document; else in each sequence."""

    def __post_init__(self) -> None:
        if self.restart_positions and not self.documents:
            raise ValueError(
                "restart_positions=True without documents: text that runs on has one run of "
                "positions; set documents too, or neither"
            )
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


IGNORED = -100
"""The label of a byte that asks for none."""


class Batch(NamedTuple):
    """Whole sequences [B, N] and what to learn from them."""

    tokens: Tensor
    """int64 [B, N]."""
    labels: Tensor
    """int64 [B, N], the next bytes; `IGNORED` where that begins another document."""
    documents: tuple[tuple[int, ...], ...] | None
    """For each sequence the first bytes of its documents, from 0; None: it is one."""

    def rows(self, start: int, stop: int) -> "Batch":
        """Return a run of the sequences."""
        documents = None if self.documents is None else self.documents[start:stop]
        return Batch(self.tokens[start:stop], self.labels[start:stop], documents)

    @property
    def cu_seqlens(self) -> Tensor | None:
        """The documents as attention takes them, int32 on the CPU; None: each sequence is one."""
        if self.documents is None:
            return None
        batch, seqlen = self.tokens.shape
        starts = [
            row * seqlen + s for row, of in enumerate(self.documents) for s in of if s < seqlen
        ]
        return torch.tensor([*starts, batch * seqlen], dtype=torch.int32)


class Size(NamedTuple):
    """What a step of all ranks trains on."""

    num_labels: int
    """Bytes that are asked for."""
    num_documents: int | None
    """Documents, each part that a sequence has of one; None: text runs on."""


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
        shortest: Files are documents, and what is shorter than so many bytes is one with what
            follows; 0: the text is one document.

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
        shortest: int = 0,
    ) -> None:
        if len(corpus) <= seqlen:
            raise ValueError(
                f"the {part} text has {len(corpus)} bytes, seqlen={seqlen} needs at least "
                f"{seqlen + 1}: name more text with --data.text, shorten --seqlen"
                + (", or raise --data.heldout" if part == "held-out" else "")
            )
        self.corpus, self.seqlen, self.seed, self.passkey = corpus, seqlen, seed, passkey
        self.shortest = shortest
        self.count = (len(corpus) - 1) // seqlen
        self._epoch, self._start, self._order = -1, 0, np.empty(0, np.int64)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return sequence `index` of the run, uint8 [seqlen + 1]."""
        if self._is_passkey(index):
            return training_sequence(self.seed, index, self.seqlen)
        return self.corpus.read(self._where(index), self.seqlen + 1)

    def documents(self, index: int) -> tuple[int, ...]:
        """Return the first bytes of the documents of sequence `index`; nothing is read.

        From 0, since a document is cut at a sequence's end; `seqlen` is among them where the byte
        after the sequence begins one. Passkey text is one document.
        """
        found = [0]
        if self.shortest and not self._is_passkey(index):
            start = self._where(index)
            for begin in self.corpus.begins(start + 1, start + self.seqlen + 1):
                if begin - start - found[-1] >= self.shortest:
                    found.append(begin - start)
        return tuple(found)

    def _is_passkey(self, index: int) -> bool:
        return bool(self.passkey) and is_passkey(self.seed, index, self.passkey)

    def _where(self, index: int) -> int:
        """Return the byte of the corpus at which sequence `index` begins."""
        epoch, number = divmod(index, self.count)
        if epoch != self._epoch:
            draw = np.random.default_rng((self.seed, epoch))
            slack = len(self.corpus) - 1 - self.count * self.seqlen
            self._start, self._order = int(draw.integers(slack + 1)), draw.permutation(self.count)
            self._epoch = epoch
        return self._start + int(self._order[number]) * self.seqlen

    def batch(self, step: int, dp_rank: int, dp_size: int, global_batch: int) -> Batch:
        """Return this data-parallel rank's part of a step, [global_batch / dp, N].

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
        documents = tuple(self.documents(first + i) for i in range(local))
        labels = text[:, 1:].clone()
        for row, starts in enumerate(documents):
            # A document's last byte asks for no byte of the next one.
            labels[row, [start - 1 for start in starts[1:]]] = IGNORED
        return Batch(text[:, :-1], labels, documents if self.shortest else None)

    def size(self, step: int, global_batch: int) -> Size:
        """Count what a step trains on, over all data-parallel ranks; nothing is read."""
        documents = [self.documents(step * global_batch + i) for i in range(global_batch)]
        ignored = sum(len(starts) - 1 for starts in documents)
        begun = sum(start < self.seqlen for starts in documents for start in starts)
        return Size(global_batch * self.seqlen - ignored, begun if self.shortest else None)


@dataclass(frozen=True)
class TrainingData:
    """The text of a run: what it trains on, what it never sees, and the files that both are of."""

    train: Sequences
    heldout: Sequences
    manifest: Manifest


def open_data(config: DataConfig, seqlen: int, seed: int, shortest: int = 1) -> TrainingData:
    """Return the data of a run; every rank that calls it with the same files gets the same.

    Args:
        shortest: Bytes of the shortest document, if files are documents: see `Sequences`.

    Raises:
        FileNotFoundError: a pattern names no file.
        ValueError: there is no text, or a part of it is shorter than a sequence.
    """
    train, heldout, manifest = open_corpus(config)
    shortest = shortest if config.documents else 0
    return TrainingData(
        Sequences(train, seqlen, seed, passkey=config.passkey, shortest=shortest),
        Sequences(heldout, seqlen, seed, "held-out", shortest=shortest),
        manifest,
    )
