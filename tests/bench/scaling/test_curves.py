"""The predicted curves."""

from pathlib import Path

import pytest

from tests.bench.commands import last_json


@pytest.mark.slow
def test_curves(tmp_path: Path) -> None:
    """Fails if a machine, a curve or the picture is missing, or what is predicted of 1M moves."""
    out = tmp_path / "curves"
    lengths = ("--seqlens", str(2**18), str(2**20))
    document = last_json("-m", "bench.scaling", "--out", str(out), *lengths)
    assert [r["calibration"]["name"] for r in document["records"]] == [
        "H200, graphs",
        "B200, graphs",
    ]
    for record in document["records"]:
        rows = {(r["mode"], r["cp"], r["seqlen"]): r for r in record["rows"]}
        assert len(rows) == 2 * 4 * 2
        for cp in (8, 16, 32, 64):
            lighthouse, dense = (rows[mode, cp, 2**20] for mode in ("lighthouse", "dense"))
            assert lighthouse["ms"] < dense["ms"] / 10
    # The goals of 1M tokens on 32 B200s.
    assert rows["lighthouse", 8, 2**20]["overhead"] < 0.08
    assert rows["lighthouse", 32, 2**20]["ms"] < 2.4
    assert rows["dense", 32, 2**20]["overhead"] < 0.05
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert "the physical limit" in out.with_suffix(".md").read_text()
