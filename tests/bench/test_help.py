"""Every command starts: its help names itself."""

import subprocess
import sys

import pytest

from tests.bench.commands import ROOT

COMMANDS = [
    *("bench.latency", "bench.latency.sweep", "bench.train_step", "bench.train_step.ranks"),
    *("bench.rotation.overhead", "bench.rotation.peer_rings", "bench.rotation.torch_ring"),
    *("bench.rotation.graphs", "bench.rotation.documents", "bench.rotation.document_balance"),
    *("bench.rotation.predict_rows", "bench.rotation.multi_gpu_page", "bench.rotation.netns"),
    *(
        "bench.scaling",
        "bench.scaling.plan",
        "tests.evidence.check_ranks",
        "tests.evidence.error_by_ranks",
    ),
    *("tests.evidence.long_cpu", "tests.evidence.netns_train"),
]


@pytest.mark.slow
@pytest.mark.parametrize("module", COMMANDS)
def test_help(module: str) -> None:
    """Fails if a command does not import, or its help is not of the module that was started."""
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python -m {module} ")
