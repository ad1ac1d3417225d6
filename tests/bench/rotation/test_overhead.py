"""The rotation's cost from the command line: on ranks, and ranks in turn."""

from pathlib import Path

import pytest

from lhcp.ring.rotation import NAMES
from tests.bench.commands import SMALL, TORCHRUN, last_json


@pytest.mark.slow
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


SLOW = ("p2p", "hybrid")
"""One of one axis and one of two; the others differ in what other tests of the ring ask."""


@pytest.mark.parametrize(
    "rotation",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SLOW else pytest.mark.soak)
        for name in NAMES
    ],
)
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
