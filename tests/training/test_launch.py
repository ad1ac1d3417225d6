"""`lhcp train` as its user starts it: to the end, going on, and failing."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SHORT = [
    *("--lighthouse-steps", "3", "--dense-steps", "2", "--eval-every", "2"),
    *("--checkpoint-every", "2", "--sample-bytes", "20", "--seqlen", "256"),
    *("--lighthouse.topk", "8", "--eval-sequences", "4"),
]


def launch(*arguments: str, ranks: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `lhcp train`, under torchrun with `ranks` ranks or as a plain process with 0."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(torchrun if ranks else []), "-m", "lhcp", "train", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )


def test_two_ranks_to_the_report_and_on(tmp_path: Path) -> None:
    short = ["--short.steps", "2", "--short.seqlen", "256"]
    arguments = ["tiny", "--cp", "2", "--baseline", "--out", str(tmp_path), *short, *SHORT]
    done = launch(*arguments, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    for expected in (
        "short          2/2  loss",
        "lighthouse     1/5  loss",
        "dense          5/5  loss",
        "baseline       5/5  loss",
        "rotation",
        "ETA",
        "written by the dense model",
        "jump at the switch",
        "final against the baseline",
    ):
        assert expected in done.stdout
    assert "lighthouse     2/5  loss" not in done.stdout
    assert done.stdout.splitlines()[-1] == f"picture: {tmp_path / 'curves.png'}"
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["world_size"] == 2 and report["run"]["cp"] == 2
    assert [r["stage"] for r in report["history"]["steps"]] == ["lighthouse"] * 3 + ["dense"] * 2
    assert set(report["stages"]) == {"lighthouse", "dense", "baseline"}
    assert {"lighthouse", "dense", "final", "jump", "recovered"} <= set(report["switch"])
    assert report["stages"]["dense"]["rotation_share"] > 0
    for arm in ("two_stages", "baseline"):
        metrics = (tmp_path / arm / "metrics.jsonl").read_text().splitlines()
        assert [r["step"] for r in map(json.loads, metrics) if r["kind"] == "step"] == [
            1,
            2,
            3,
            4,
            5,
        ]

    # One rank goes on where two have ended: nothing is left to do but the report.
    arguments[arguments.index("--cp") + 1] = "1"
    again = launch(*arguments)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "going on after step 5" in again.stdout and "1/5" not in again.stdout
    assert "short  " not in again.stdout
    second = json.loads((tmp_path / "report.json").read_text())
    assert second["history"] == report["history"]


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    arguments = ["--optim.lr", "1e30", "--optim.warmup-steps", "0", "--out", str(tmp_path), *SHORT]
    done = launch("tiny", *arguments)
    assert done.returncode == 1
    assert "rank 0: FloatingPointError: step 2 (lighthouse): loss" in done.stderr
    assert "--optim.lr" in done.stderr


def test_an_error_on_one_rank_ends_all(tmp_path: Path) -> None:
    script = tmp_path / "one_fails.py"
    script.write_text(
        "import torch.distributed as dist\n"
        "from lhcp.training.process import run_to_exit\n"
        "def main(own):\n"
        "    if own.rank == 1:\n"
        "        raise ValueError('only here')\n"
        "    dist.barrier()\n"
        "run_to_exit(main)\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", str(script)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "rank 1: ValueError: only here" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cp", "2"], "cp=2: must divide the 1 ranks"),
        (["--data.text", "nowhere/*.txt"], "'nowhere/*.txt' names no file"),
        (["--lighthouse.topk", "7"], "topk=7: must be a positive multiple"),
    ],
    ids=["cp", "text", "topk"],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str) -> None:
    done = launch("tiny", *arguments)
    assert done.returncode != 0
    # The command line's own errors are wrapped and framed.
    assert message in " ".join(re.sub("[│╭╮╰╯─]", " ", done.stdout + done.stderr).split())


def test_a_console_that_shows_ascii_alone(tmp_path: Path) -> None:
    """Fails if a byte that the model wrote, or one of a path, ends a run that was done.

    The seed's sample has bytes that are no text: they are shown as U+FFFD, which ASCII has not.
    """
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\xff")
    arguments = ["tiny", "--out", folder, *SHORT, "--sample-bytes", "200"]
    done = launch(*arguments, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\\ufffd" in done.stdout and "caf" in done.stdout.splitlines()[-1]
    assert (Path(folder) / "curves.png").exists()
    again = launch(*arguments, "--dense-steps", "3", PYTHONIOENCODING="utf-8")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "going on after step 5" in again.stdout


def test_a_resumed_run_says_what_is_read_again(tmp_path: Path) -> None:
    """Fails if eight held-out sequences are taken from a text that has one, unsaid."""
    text = tmp_path / "text"
    text.write_bytes(bytes(range(32, 127)) * 80)
    done = launch("tiny", "--data.text", str(text), "--out", str(tmp_path / "out"), *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "eval_sequences=4, but the held-out text has 1 of N=256" in done.stdout
