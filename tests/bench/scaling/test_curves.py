"""The predicted curves."""

from pathlib import Path

import pytest

from tests.bench.commands import last_json


@pytest.mark.slow
def test_curves(tmp_path: Path) -> None:
    """Fails if a curve is missing, or lighthouse is predicted to cost more than dense at 1M."""
    out = tmp_path / "curves"
    document = last_json("-m", "bench.scaling", "--out", str(out))
    longest = [r for r in document["rows"] if r["seqlen"] == 2**20]
    times = {(r["mode"], r["cp"]): r["ms"] for r in longest}
    assert times["lighthouse", 8] < times["dense", 8] / 10
    assert times["lighthouse", 32] < times["dense", 32] / 10
    assert out.with_suffix(".png").stat().st_size > 10_000
