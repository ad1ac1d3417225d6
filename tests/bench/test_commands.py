"""The benchmark programs from the command line, at sizes that say nothing about speed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
SMALL = ("--heads", "2", "--head-dim", "16", "--repeats", "2")

pytestmark = pytest.mark.slow


def last_json(*command: str) -> dict[str, Any]:
    """Run a program from the repository's root and read its last line."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    document: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return document


def test_overhead_on_ranks(tmp_path: Path) -> None:
    """Fails if the card, a rotation, the timeline or the last line is missing."""
    png = tmp_path / "timeline.png"
    document = last_json(
        *(
            *TORCHRUN,
            "2",
            "-m",
            "bench.rotation.overhead",
            "--rotations",
            "p2p",
            "allgather",
            "alltoall",
        ),
        *("--seqlens", "2048", "--topk", "32", "--strata", "8", "--png", str(png), *SMALL),
    )
    assert document["card"]["link"]["gb_s"] > 0 and document["card"]["copy_gb_s"] > 0
    rotations = [report["setting"]["rotation"] for report in document["reports"]]
    assert rotations == ["p2p", "allgather", "alltoall"]
    assert png.stat().st_size > 10_000


@pytest.mark.parametrize("rotation", ["p2p", "allgather", "hierarchical", "alltoall"])
def test_ranks_in_turn(rotation: str) -> None:
    """Fails if a rotation cannot run without messages, or costs less than its share of the work."""
    document = last_json(
        *("-m", "bench.rotation.overhead", "--simulate-ranks", "4", "--nodes", "2"),
        *("--rotations", rotation),
        *("--seqlens", "2048", "--heads", "4", "--head-dim", "16", "--repeats", "3"),
    )
    (row,) = document["in_turn"]
    assert len(row["ranks"]) == 4 and row["rotation"] == rotation
    assert row["rank"]["both"] > 0.7


def test_curves(tmp_path: Path) -> None:
    """Fails if a curve is missing, or lighthouse is predicted to cost more than dense at 1M."""
    out = tmp_path / "curves"
    document = last_json("-m", "bench.scaling", "--out", str(out))
    longest = [r for r in document["rows"] if r["seqlen"] == 2**20]
    times = {(r["mode"], r["cp"]): r["ms"] for r in longest}
    assert times["lighthouse", 8] < times["dense", 8] / 10
    assert times["lighthouse", 32] < times["dense", 32] / 10
    assert out.with_suffix(".png").stat().st_size > 10_000
