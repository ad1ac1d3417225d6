"""The slow network: its verdicts, its links, and that nothing of it stays behind."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.common.page import Page
from bench.rotation import netns
from bench.rotation.namespaces import ROOT, Nodes, NotAllowed, nodes
from bench.rotation.netns import orders, rates, verdicts


def test_verdicts_are_of_ratios_and_of_small_differences() -> None:
    """Fails if the namespaces' verdict takes a wrong prediction for a right one."""

    def phase(predicted: float, measured: float) -> dict[str, Any]:
        return {
            "predicted": {"exposed": 1e3, "T": 100.0},
            "with_compute": {"exposed": predicted, "T": 100.0},
            "measured": {"exposed": measured, "T": 100.0},
        }

    def ok(predicted: float, measured: float) -> bool:
        record = {
            "rotation": "p2p",
            "forward": phase(predicted, measured),
            "backward": phase(50.0, 50.0),
        }
        first, second = verdicts({"records": [record]}, "with_compute")
        assert second["ok"] and not any(one["ok"] for one in verdicts({"records": [record]}))
        return bool(first["ok"])

    assert ok(40.0, 44.0) and not ok(40.0, 60.0) and not ok(40.0, 30.0)
    assert ok(0.0, 4.0) and not ok(0.0, 6.0) and ok(2.0, 0.0)


def test_exposed_time_off_the_model_is_named() -> None:
    """Fails if a row beyond the bounds is shown as right, or an unshaped link is judged."""
    times = {"T": 100.0, "C": 60.0, "M": 50.0, "exposed": 40.0, "calls": [60.0, 70.0]}
    right = {"bytes": 1, "predicted": times, "with_compute": times, "measured": times}
    off = right | {"measured": times | {"exposed": 60.0}, "with_compute": times | {"exposed": 50.0}}
    document = {
        "records": [{"rotation": "p2p", "forward": right, "backward": off}],
        "calibration": {"outer": {"bandwidth": 1e6, "latency": 1e-3}},
    }
    page = Page("a title", {})
    netns.show(page, "free", None, document)
    assert page.wrong == []
    netns.show(page, "balanced", 100.0, document)
    assert page.wrong == ["balanced, p2p backward: 1.50 and 1.20"]
    with pytest.raises(SystemExit, match="p2p backward"):
        page.close(None, [])


def test_rates_are_of_the_bytes_between_nodes() -> None:
    """Fails if bytes inside a node slow the links between nodes down."""
    phase = {"bytes": 5000, "across_bytes": 1000, "measured": {"C": 2.0}}
    document = {"records": [{"forward": phase, "backward": phase}]}
    # 2,000 bytes of each rank, in as long as 4 ms of compute, and in half of that.
    assert rates(document, [1.0, 0.5]) == pytest.approx([4.0, 8.0])


def test_rotations_are_held_to_their_order() -> None:
    """Fails if a rotation that was to be clearly ahead may be behind, or a near one is judged."""

    def record(name: str, predicted: float, measured: float) -> dict[str, Any]:
        phase = {"predicted": {"T": predicted / 2}, "measured": {"T": measured / 2}}
        return {"rotation": name, "forward": phase, "backward": phase}

    records = [record("a", 100, 130), record("b", 105, 90), record("c", 120, 120)]
    found = orders({"records": records})
    # b is 5% behind a, and 12% ahead of c.
    assert [(one["first"], one["second"], one["ok"]) for one in found] == [
        ("a", "c", False),
        ("b", "c", True),
    ]


def test_nodes_are_removed_when_told_to_end() -> None:
    """Fails if a program that is ended leaves its namespaces, or what runs on them, behind."""
    try:
        with nodes(1):
            pass
    except NotAllowed as error:
        pytest.skip(str(error))
    program = (
        "import subprocess\n"
        "from bench.rotation.namespaces import nodes\n"
        "with nodes(1) as network:\n"
        "    inside = subprocess.Popen(['ip', 'netns', 'exec', network.names[0], 'sleep', '60'])\n"
        "    print(inside.pid, flush=True)\n"
        "    inside.wait()\n"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    inside = int(running.stdout.readline())
    running.terminate()
    assert running.wait(30) == 1
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert f"lhcp{running.pid}-" not in left
    assert not Path(f"/proc/{inside}").exists()


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
            *("-m", "bench.scaling", "--measure", "--device", "cpu", "--nodes", "2"),
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
            # The shaper lets a burst of 72 KiB through at once.
            least = 1e3 * (phase["bytes"] - 72 * 2**10) / (200e6 / 8)
            assert phase["measured"]["M"] > 0.95 * least
            assert 0.5 < phase["measured"]["exposed"] / phase["predicted"]["exposed"] < 2
            # T and M, alone and both directions in one go, three times and once to warm up.
            sent += phase["bytes"] * 2 * 2 * 4
    assert network.sent_bytes(0) - before > sent
