"""The benchmark programs from the command line, at sizes that say nothing about speed."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

from netns import Nodes, NotAllowed, nodes, verdicts  # noqa: E402

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
        *(*TORCHRUN, "2", "bench/overhead.py", "--rotations", "p2p", "allgather", "alltoall"),
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
        *("bench/overhead.py", "--simulate-ranks", "4", "--nodes", "2", "--rotations", rotation),
        *("--seqlens", "2048", "--heads", "4", "--head-dim", "16", "--repeats", "3"),
    )
    (row,) = document["in_turn"]
    assert len(row["ranks"]) == 4 and row["rotation"] == rotation
    assert row["rank"]["both"] > 0.7


def test_curves(tmp_path: Path) -> None:
    """Fails if a curve is missing, or lighthouse is predicted to cost more than dense at 1M."""
    out = tmp_path / "curves"
    document = last_json("bench/scaling_model.py", "--out", str(out))
    longest = [r for r in document["rows"] if r["seqlen"] == 2**20]
    times = {(r["mode"], r["cp"]): r["ms"] for r in longest}
    assert times["lighthouse", 8] < times["dense", 8] / 10
    assert times["lighthouse", 32] < times["dense", 32] / 10
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_verdicts_are_of_ratios_and_of_small_differences() -> None:
    """Fails if the namespaces' verdict takes a wrong prediction for a right one."""

    def phase(predicted: float, measured: float) -> dict[str, Any]:
        return {
            "predicted": {"exposed": predicted, "T": 100.0},
            "measured": {"exposed": measured, "T": 100.0},
        }

    def ok(predicted: float, measured: float) -> bool:
        record = {
            "rotation": "p2p",
            "forward": phase(predicted, measured),
            "backward": phase(50.0, 50.0),
        }
        first, second = verdicts({"records": [record]})
        assert second["ok"]
        return bool(first["ok"])

    assert ok(40.0, 44.0) and not ok(40.0, 60.0) and not ok(40.0, 30.0)
    assert ok(0.0, 4.0) and not ok(0.0, 6.0) and ok(2.0, 0.0)


@pytest.fixture
def network() -> Iterator[Nodes]:
    """Two nodes joined by a link of 200 megabits a second, where the machine allows it."""
    try:
        with nodes(2) as made:
            made.shape(200)
            yield made
    except NotAllowed as error:
        pytest.skip(str(error))


@pytest.mark.soak  # compares times: for a quiet machine
def test_link_between_namespaces(network: Nodes, tmp_path: Path) -> None:
    """Fails if messages beat the link's rate, or if the model misses what a slow link exposes.

    The bounds are wide: machines that run tests are seldom quiet; bench/results has narrow ones.
    """
    before = network.sent_bytes(0)
    network.torchrun(
        1,
        (
            *("bench/scaling_model.py", "--measure", "--device", "cpu", "--nodes", "2"),
            *("--rotations", "p2p", "allgather", "--seqlens", "2048", "--repeats", "3"),
            *("--heads", "4", "--head-dim", "32", "--large-message", str(2**20)),
            *("--out", str(tmp_path / "found")),
        ),
        timeout=400,
    )
    document = json.loads((tmp_path / "found.json").read_text())
    sent = 0
    for record in document["records"]:
        for name in ("forward", "backward"):
            phase = record[name]
            # The shaper lets a burst of 128 KiB through at once.
            least = 1e3 * (phase["bytes"] - 2**17) / (200e6 / 8)
            assert phase["measured"]["M"] > 0.95 * least
            assert 0.5 < phase["measured"]["exposed"] / phase["predicted"]["exposed"] < 2
            # T and M, alone and both directions in one go, three times and once to warm up.
            sent += phase["bytes"] * 2 * 2 * 4
    assert network.sent_bytes(0) - before > sent
