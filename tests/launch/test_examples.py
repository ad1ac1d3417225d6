"""Each program of launch/examples runs as its docstring says, and its results hold."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.stem for path in (ROOT / "launch/examples").glob("*.py"))


def run(name: str, ranks: int = 2) -> str:
    """Run an example on CPU ranks and return what it printed."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
    }
    for _ in range(2):
        done = subprocess.run(
            [*torchrun, "--nproc-per-node", str(ranks), f"launch/examples/{name}.py"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        # A gloo rank that is done now and then aborts while Python ends (lhcp/training/process.py).
        if "terminate called without an active exception" not in done.stderr:
            break
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def differences(printed: str) -> list[float]:
    """Return each difference to one rank that an example printed."""
    return [float(x) for x in re.findall(r"difference to one rank (\S+)", printed)]


def test_ring_attention_equals_one_rank() -> None:
    """Fails if the output or a gradient differs from one rank's by more than rounding."""
    printed = run("ring_attention")
    assert "2 ranks on cpu, 128 of 256 tokens on each" in printed
    found = differences(printed)
    assert len(found) == 4 and max(found) < 1e-5, printed


def test_lighthouse_layer_equals_one_rank_in_both_modes() -> None:
    """Fails if loss or gradients depend on the ranks, or if the mode changes nothing."""
    printed = run("lighthouse_layer")
    found = differences(printed)
    assert len(found) == 4 and max(found) < 1e-5, printed
    by_mode = dict(re.findall(r"(\w+): loss (\S+),", printed))
    assert by_mode.keys() == {"lighthouse", "dense"} and len(set(by_mode.values())) == 2


@pytest.mark.parametrize(
    "ranks", [2, pytest.param(4, marks=pytest.mark.slow)], ids=["dp1cp2", "dp2cp2"]
)
def test_fsdp2_steps_equal_one_rank(ranks: int) -> None:
    """Fails if gradients are averaged or lost: the loss after a step of SGD then differs."""
    printed = run("fsdp2_mesh", ranks)
    found = differences(printed)
    assert len(found) == 3 and max(found) < 1e-3, printed
    losses = [float(x) for x in re.findall(r"loss (\S+),", printed)]
    # A step moves the loss by far more than what two meshes may differ by.
    assert losses[0] - losses[2] > 0.1, printed


def test_an_existing_model_trains_as_with_torch_alone() -> None:
    """Fails if three changed lines change what is computed."""
    printed = run("existing_model")
    found = differences(printed)
    assert len(found) == 3 and max(found) < 1e-5, printed
    losses = [float(x) for x in re.findall(r"loss (\S+),", printed)]
    assert losses[0] - losses[2] > 0.1, printed


def test_measure_rotation_prints_its_verdict_and_its_table() -> None:
    """Fails if the sentence or a row is missing, or the numbers are not those of their times."""
    printed = run("measure_rotation")
    assert printed.startswith("The rotation") and "of your step of 1.9 s" in printed
    assert "| W=2 |" in printed and "| N=4,096 |" in printed
    table = printed.split("\nms ")[1]
    for phase in ("forward", "backward", "both"):
        (row,) = re.findall(rf"^{phase} \(T .*?\) +(.*)$", table.split("the whole layer")[0], re.M)
        real, _, _, single, *derived = row.split()
        # Blank where it is noise.
        if derived[0].endswith("%"):
            found = 100 * (float(real) / float(single) - 1)
            assert float(derived[0].rstrip("%")) == pytest.approx(found, abs=1), row
        assert float(derived[-2]) > 0, row


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_use_public_names_alone(name: str) -> None:
    """Fails if an example imports more of the library than `import lhcp` gives."""
    text = (ROOT / f"launch/examples/{name}.py").read_text()
    imports = re.findall(r"^(?:from|import) (?:lhcp|launch)\b.*$", text, re.M)
    assert imports == ["import lhcp"]
    assert f"nproc-per-node 2 launch/examples/{name}.py" in text
