"""Sequences cut from a corpus, in an order that is a pure function of seed and step."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lhcp.training.corpus import Corpus
from lhcp.training.passkey import is_passkey, training_sequence

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
