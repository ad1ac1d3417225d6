"""The training step's table from the command line, at a size that says nothing about speed."""

from pathlib import Path

import pytest

from tests.bench.commands import last_json


@pytest.mark.slow
def test_train_step(tmp_path: Path) -> None:
    """Fails if a row, an extrapolated dense step, the profile or a picture is missing."""
    document = last_json(
        *("-m", "bench.train_step", "--device", "cpu", "--backend", "cpu", "--compiler", "none"),
        *("--lengths", "512", "1024", "2048", "--checkpointed-lengths", "512", "--dim", "64"),
        *("--skip-dense-above", "1024", "--profile-at", "512", "--gate-length", "512"),
        *("--layers", "3", "--heads", "2", "--head-dim", "16", "--hidden-dim", "64"),
        *("--dense-layers", "0", "--num-strata", "4", "--seconds", "1", "--out", str(tmp_path)),
    )
    rows = document["rows"]
    assert [(row["seqlen"], row["checkpointed"]) for row in rows] == [
        *((512, False), (512, True), (1024, False), (2048, False))
    ]
    assert ["extrapolated" in row["dense"] for row in rows] == [False, False, False, True]
    assert set(document["profiles"]) == {"dense", "lighthouse"}
    kinds = {path.name.split("_cpu", 1)[1] for path in tmp_path.iterdir()}
    assert kinds == {".md", ".json", "_speedup.png", "_profile.png"}
