"""launch/recover.py and launch/recover_page.py, from the command line to the page."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

SHORT = [
    *("--eval-every", "4", "--checkpoint-every", "3", "--eval-sequences", "2"),
    *("--seqlen", "256", "--lighthouse.topk", "8"),
]


def command(*arguments: str, ranks: int = 0) -> list[str]:
    """Return the command of launch/recover.py, under torchrun with `ranks` ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    program = [*(torchrun if ranks else []), "launch/recover.py", "recover_tiny"]
    return [sys.executable, *program, *arguments, *SHORT]


def launch(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240
    )


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_from_the_command_line_to_the_page(tmp_path: Path) -> None:
    """Fails if the program, killed and taken up again, does not end in the picture of all seeds.

    Seed 0 comes from a plain process that is killed, seed 1 from two ranks in another folder.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    (tmp_path / "text").write_bytes(bytes(range(32, 127)) * 400)
    same = ("--splits", "6+6", "9+3", "--data.text", str(tmp_path / "text"))
    first = command("--seeds", "0", *same, "--out", str(one))
    # In a session of its own: a stopped process must not stop, or end, the group of the tests.
    killed = subprocess.Popen(
        first,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert killed.stdout is not None
        for line in killed.stdout:
            if line.startswith("lighthouse     6  held-out"):
                break
        killed.send_signal(signal.SIGSTOP)
        refused = launch(first)
    finally:
        killed.kill()
        killed.wait()
    assert refused.returncode == 1 and f"in use by another run (process {killed.pid}" in (
        refused.stderr
    )
    again = launch(first)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "seed 0, dense: done before" in again.stdout
    assert "lighthouse     2/9" not in again.stdout

    seeds = command(
        *("--seeds", "1", *same, "--cp", "2", "--no-page", "--out", str(two)),
        ranks=2,
    )
    done = launch(seeds)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(p.name for p in two.iterdir()) == ["recover_tiny_seed1.jsonl", "seed1"]
    page = tmp_path / "page"
    program = [sys.executable, "launch/recover_page.py"]
    merged = launch([*program, str(one), str(two), "--page", str(page)])
    assert merged.returncode == 0, merged.stdout + merged.stderr
    assert "- seeds: 0, 1;" in merged.stdout and "n=2)" in merged.stdout
    for folder, cards in ((one, "cpu"), (page, "cpu_cpux2")):
        assert {p.suffix for p in folder.glob(f"recover_tiny_{cards}_20*")} == {
            ".md",
            ".json",
            ".png",
        }
    assert merged.stdout.splitlines()[-1].startswith(f"page: {page}/recover_tiny_")
