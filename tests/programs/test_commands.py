"""The commands on two ranks, as their user starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lhcp

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
pytestmark = pytest.mark.slow


def run(folder: Path, *arguments: str, ranks: bool = True, status: int = 0) -> str:
    """Run `lhcp ARGUMENTS` outside of the checkout and return what it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *(TORCHRUN if ranks else ()), "-m", "lhcp", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert bool(done.returncode) == bool(status), done.stdout + done.stderr
    return done.stdout if status == 0 else done.stderr


def test_overhead_is_a_sentence_within_its_budget(tmp_path: Path) -> None:
    """Fails if the sentence, the share of a step or the numbers are missing."""
    small = ("--seqlen", "1000", "--heads", "2", "--head-dim", "16", "--budget", "3")
    step = ("--step-seconds", "0.5", "--layers", "4", "--json", "found.json")
    said = run(tmp_path, "overhead", *small, *step)
    assert said.startswith("The rotation") and "of your step of 0.5 s" in said
    assert "N=1,024" in said and len(said.splitlines()) <= 4
    report = lhcp.OverheadReport.from_json((tmp_path / "found.json").read_text())
    assert report.setting["world_size"] == 2 and report.phase("both").exposed_error is not None
    assert "contention" in run(tmp_path, "overhead", *small, "--table")
    # Dense attention takes odd lengths too.
    assert "N=1,000 " in run(tmp_path, "overhead", *small, "--dense", "--seqlen", "997")


def test_overhead_of_a_rotation_for_nodes(tmp_path: Path) -> None:
    """Fails if ranks cannot be told that they are on nodes, or two ways to choose both count."""
    small = ("--seqlen", "1000", "--heads", "2", "--head-dim", "16", "--budget", "1", "--dense")
    over_nodes = ("overhead", *small, "--nodes", "2")
    assert "\nhybrid | zigzag | W=2" in run(tmp_path, *over_nodes, "--rotation", "hybrid")
    said = run(tmp_path, *over_nodes, "--rotation", "p2p", "--calibration", "x.json", status=1)
    assert "leave one out" in said
    said = run(tmp_path, "overhead", *small, "--rotation", "hybrid", status=1)
    assert "--nodes" in said


def test_calibrate_writes_what_is_read_back(tmp_path: Path) -> None:
    sizes = ("--seqlens", "128", "--queries", "64", "--keys", "64", "--heads", "2")
    said = run(tmp_path, "calibrate", "--out", "table.json", *sizes)
    assert said.splitlines()[-1] == "written: table.json" and "GB/s" in said
    table = lhcp.read_calibration(str(tmp_path / "table.json"))
    assert (table.num_heads, len(table.full)) == (2, 1) and table.inner.bandwidth < 1e12
    # One process has no links to measure, and says so.
    alone = run(tmp_path, "calibrate", "--out", "one.json", *sizes, ranks=False)
    assert "not measured, one process" in alone
    assert "torch has none" in run(tmp_path, "calibrate", "--dtype", "b16", ranks=False, status=1)


def test_doctor_says_what_is_wrong_last(tmp_path: Path) -> None:
    said = run(tmp_path, "doctor", "--seqlen", "256", "--heads", "2", "--head-dim", "16")
    order = [said.index(f"\n{part}\n") for part in ("ranks", "chosen", "measured", "wrong")]
    assert order == sorted(order)


def test_export_is_of_one_process(tmp_path: Path) -> None:
    """Fails if a run cannot be exported, or several ranks write one file."""
    short = ("--lighthouse-steps", "2", "--dense-steps", "2", "--sample-bytes", "0")
    small = ("--seqlen", "256", "--lighthouse.topk", "8", "--eval-sequences", "2")
    run(tmp_path, "train", "tiny", "--cp", "2", "--out", "out", *short, *small)
    said = run(tmp_path, "export", "out/two_stages", "--out", "llama", status=1)
    assert "one process exports" in said
    pytest.importorskip("safetensors")
    run(tmp_path, "export", "out/two_stages", "--out", "llama", ranks=False)
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert config["max_position_embeddings"] == 256
