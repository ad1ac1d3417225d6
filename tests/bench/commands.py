"""How the tests run a benchmark from the command line, at sizes that say nothing about speed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
SMALL = ("--heads", "2", "--head-dim", "16", "--repeats", "2")


def last_json(*command: str) -> dict[str, Any]:
    """Run a program from the repository's root and read its last line."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    document: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return document
