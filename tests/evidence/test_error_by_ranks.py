"""Errors by number of ranks: what holds passes, and what does not ends with status 1."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lhcp.testing.ranks import RankPool
from tests.evidence import error_by_ranks
from tests.evidence.programs import end_of, on_rank_one

right_errors = error_by_ranks.answer

ERRORS = "--ranks 2 4 --rotations allgather hierarchical --dtypes float32 --seqlen 256 --seeds 2"
ERRORS += " --layer-seqlen 512 --topk 16 --strata 8 --head-dim 16"


def wrong_errors(group: Any, *args: Any) -> Any:
    """Make dk of rank 1 a hundredth too large."""
    (out, dq, dk, dv), entries = right_errors(group, *args)
    return (out, dq, dk * 1.01 if on_rank_one(group) else dk, dv), entries


def nan_errors(group: Any, *args: Any) -> Any:
    """Leave one row of rank 1 that nothing wrote."""
    (out, *grads), entries = right_errors(group, *args)
    if on_rank_one(group):
        out[0, 0] = torch.nan
    return (out, *grads), entries


def other_entries(group: Any, *args: Any) -> Any:
    """Return rank 1's entries in another order."""
    parts, entries = right_errors(group, *args)
    if entries is not None and on_rank_one(group):
        entries = (entries[0], entries[1].roll(1))
    return parts, entries


def test_errors_that_hold(ranks: RankPool, tmp_path: Path) -> None:
    """Fails if a right answer does not hold, or a row is missing."""
    code, document = end_of(error_by_ranks, ranks, ERRORS, tmp_path / "page")
    assert code is None and document["wrong"] == []
    # Two rotations, dense and the layer, four tensors, two errors.
    assert len(document["records"]) == 2 * 2 * 4 * 2
    assert all(set(record["by_ranks"]) == {"1", "2", "4"} for record in document["records"])
    assert all(0 < record["by_ranks"]["1"] < 1e-5 for record in document["records"])


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (wrong_errors, "float32, dense, S=256, allgather, dk"),
        (nan_errors, "float32, dense, S=256, allgather, out: inf"),
        (other_entries, "allgather, W=2: other entries than on one rank"),
    ],
    ids=["gradient", "nan", "entries"],
)
def test_errors_that_do_not_hold(
    ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Any, said: str
) -> None:
    """Fails if a wrong gradient, a NaN or a wrong selection on one rank ends with status 0."""
    monkeypatch.setattr(error_by_ranks, "answer", answer)
    code, document = end_of(error_by_ranks, ranks, ERRORS, tmp_path / "page")
    # A string: Python prints it and ends with status 1.
    assert isinstance(code, str) and said in code
    assert any(said in wrong for wrong in document["wrong"])
