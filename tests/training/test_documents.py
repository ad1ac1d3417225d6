"""Files as documents: where they begin, what is not asked for, and the same step on any mesh."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lhcp.packing import read_packing
from lhcp.training.corpus import Corpus, Piece
from lhcp.training.data import DataConfig, open_data
from lhcp.training.parallel import build
from lhcp.training.run import Run
from lhcp.training.sequences import IGNORED, Sequences
from lhcp.training.stages import OptimConfig
from tests.training.test_loss_scale import both_modes

SEQLEN = 64


def corpus_of(folder: Path, sizes: list[int]) -> Corpus:
    """Files of these sizes, whose bytes are their numbers."""
    pieces = []
    for number, size in enumerate(sizes):
        path = folder / f"{number:03d}"
        path.write_bytes(bytes([number % 256]) * size)
        pieces.append(Piece(path, 0, size))
    return Corpus(pieces)


SIZES = [200, 1, 64, 63, 2, 3, 65, 10, 128, 5, 5, 5, 90]


@pytest.mark.parametrize("shortest", [1, 4, 40])
def test_documents_are_files(tmp_path: Path, shortest: int) -> None:
    """Fails if a document begins elsewhere than a file, or a short one is not one with its next."""
    data = Sequences(corpus_of(tmp_path, SIZES), SEQLEN, 3, shortest=shortest)
    for index in range(2 * data.count):
        text = data[index]
        wanted = [0]
        for at in (np.flatnonzero(np.diff(text.astype(int))) + 1).tolist():
            if at - wanted[-1] >= shortest:
                wanted.append(at)
        assert data.documents(index) == tuple(wanted)


def test_no_byte_of_the_next_document_is_asked_for(tmp_path: Path) -> None:
    """Fails if a label is the first byte of another file, or another label is lost."""
    data = Sequences(corpus_of(tmp_path, SIZES), SEQLEN, 3, shortest=1)
    for step in range(3):
        batch = data.batch(step, 0, 1, 3)
        kept = batch.labels != IGNORED
        # Bytes are their files' numbers: inside a file the next byte is the same.
        assert torch.equal(batch.labels[kept], batch.tokens[kept])
        assert batch.documents is not None and batch.cu_seqlens is not None
        inside = sum(s < SEQLEN for of in batch.documents for s in of)
        assert (
            data.size(step, 3)
            == (int(kept.sum()), inside)
            == (int(kept.sum()), len(batch.cu_seqlens) - 1)
        )
        parts = [data.batch(step, rank, 3, 3) for rank in range(3)]
        assert [part.documents for part in parts] == [(of,) for of in batch.documents]
        assert batch.rows(1, 3).documents == batch.documents[1:]
        # The bounds are those of the files.
        files = batch.tokens.flatten()
        begins = batch.cu_seqlens[1:-1].tolist()
        edges = {t for t in range(1, len(files)) if files[t] != files[t - 1] or t % SEQLEN == 0}
        assert set(begins) == edges


def test_without_documents_every_byte_is_asked_for(tmp_path: Path) -> None:
    data = Sequences(corpus_of(tmp_path, SIZES), SEQLEN, 3)
    batch = data.batch(0, 0, 1, 3)
    assert batch.documents is None and batch.cu_seqlens is None
    assert (batch.labels != IGNORED).all() and data.size(0, 3) == (3 * SEQLEN, None)


def test_every_sequence_fits_the_selection(tmp_path: Path, small_run: Run) -> None:
    """Fails if a run could meet a stratum in which more documents begin than it can expand."""
    run = replace(small_run, seqlen=256, data=DataConfig(documents=True))
    generator = np.random.default_rng(0)
    corpus = corpus_of(tmp_path, generator.integers(1, 12, 250).tolist())
    data = Sequences(corpus, run.seqlen, 0, shortest=run.shortest_document)
    most = 0
    for index in range(data.count):
        cu_seqlens = data.batch(index, 0, 1, 1).cu_seqlens
        assert cu_seqlens is not None
        read_packing(cu_seqlens, 1, run.seqlen).check_fits(run.lighthouse, 2)
        most = max(most, len(cu_seqlens) - 1)
    # So that the test can fail: files are shorter than what fits, and documents many.
    assert most > 16 and run.shortest_document > 6
    loose = Sequences(corpus, run.seqlen, 0, shortest=1).batch(0, 0, 1, 1).cu_seqlens
    assert loose is not None
    with pytest.raises(ValueError, match="documents begin in"):
        read_packing(loose, 1, run.seqlen).check_fits(run.lighthouse, 2)


def test_positions_restart_in_documents_alone() -> None:
    with pytest.raises(ValueError, match="restart_positions=True without documents"):
        DataConfig(restart_positions=True)


@pytest.fixture
def packed_run(small_run: Run, tmp_path: Path) -> Run:
    """Many short files, some shorter than a document may be."""
    generator = np.random.default_rng(1)
    for number, size in enumerate(generator.integers(1, 400, 150).tolist()):
        (tmp_path / f"{number:03d}.txt").write_bytes(generator.bytes(size))
    text = (str(tmp_path / "*.txt"),)
    sgd = OptimConfig(kind="sgd", lr=0.5, warmup_steps=0, clip=float("inf"))
    data = DataConfig(text=text, heldout=0.2, documents=True, restart_positions=True)
    return replace(small_run, optim=sgd, data=data)


@pytest.mark.parametrize(
    ("dp", "cp", "accumulate"), [(1, 2, 2), pytest.param(2, 2, 1, marks=pytest.mark.slow)]
)
def test_step_does_not_depend_on_the_mesh(
    dp: int,
    cp: int,
    accumulate: int,
    packed_run: Run,
    one_rank: None,
    run_ranks: Callable[..., list[Any]],
) -> None:
    """Fails if the mean is over the tokens of one rank, or documents are cut over ranks wrongly."""
    alone = both_modes(None, packed_run)
    meshed = replace(packed_run, cp=cp, accumulate=accumulate)
    for result in run_ranks(dp * cp, both_modes, meshed):
        for mode, expected in alone.items():
            for name, values in expected.items():
                assert result[mode][name] == pytest.approx(values, rel=3e-6), (mode, name)


@torch.no_grad()
def test_a_document_is_read_as_alone(packed_run: Run, one_rank: None) -> None:
    """Fails if the model is not told of the documents, or positions do not begin with each."""
    data = open_data(packed_run.data, packed_run.seqlen, 0, packed_run.shortest_document)
    trainee = build(packed_run, torch.device("cpu"))
    batch = data.train.batch(0, 0, 1, 2)
    for block in trainee.model.blocks:
        block.get_submodule("attention.core").mode = "dense"  # type: ignore[assignment]
    where = trainee.placement.rope_positions(packed_run.seqlen, batch.cu_seqlens)
    logits = trainee.model(batch.tokens, where, batch.cu_seqlens)
    assert batch.documents is not None
    for row, starts in enumerate(batch.documents):
        edges = [*(s for s in starts if s < packed_run.seqlen), packed_run.seqlen]
        for first, stop in list(itertools.pairwise(edges))[:3]:
            alone = trainee.model(
                batch.tokens[row : row + 1, first:stop], torch.arange(stop - first)
            )
            assert torch.allclose(logits[row, first:stop], alone[0], atol=1e-5)
