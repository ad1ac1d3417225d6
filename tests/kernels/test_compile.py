"""Every kernel compiles for every GPU that the library serves, with no GPU present.

Kernels are launched at real sizes on meta tensors in a fresh process with the interpreter off; the
launch is replaced by a compilation for the named architecture.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARCHS = [80, 90, 100, 120]


@pytest.mark.parametrize("arch", [90, pytest.param(80, marks=pytest.mark.slow),
                                  pytest.param(100, marks=pytest.mark.slow),
                                  pytest.param(120, marks=pytest.mark.slow)])  # fmt: skip
def test_compiles(arch):
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.kernels.compile_all", str(arch)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
