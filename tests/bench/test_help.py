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


STARTS = """
import os, runpy, sys
for module in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        sys.argv = [module, "--help"]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    said, status = os.waitpid(child, 0)
    if status:
        sys.exit(f"{module}: {status}")
"""
"""One after another, each in a copy of a process that has torch, which takes longest to import."""


@pytest.mark.slow
def test_help() -> None:
    """Fails if a command does not import, or its help is not of the module that was started."""
    command = [sys.executable, "-c", f"import torch, lhcp\n{STARTS}", *COMMANDS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    for module in COMMANDS:
        assert f"usage: python -m {module} " in done.stdout
