"""Two nodes, as network namespaces: doctor, and training by the forms of launch/.

Skipped, with the reason, where a machine allows no namespaces.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.rotation.namespaces import ROOT, Nodes, NotAllowed, nodes


def small(steps: int = 2) -> tuple[str, ...]:
    """Return the arguments of a run of so many steps of each stage."""
    return (
        *("tiny", "--seqlen", "256", "--lighthouse.topk", "8", "--eval-sequences", "4"),
        *("--lighthouse-steps", str(steps), "--dense-steps", str(steps), "--sample-bytes", "0"),
        *("--rotation-budget", "0", "--optim.kind", "sgd"),
    )


PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
"""With this interpreter's torchrun first."""


@pytest.fixture
def network() -> Iterator[Nodes]:
    """Two nodes joined by a link of 100 megabits a second."""
    try:
        made = nodes(2)
        network = made.__enter__()
    except NotAllowed as error:
        pytest.skip(f"network namespaces are not possible here: {error}")
    try:
        network.shape(100)
        yield network
    finally:
        made.__exit__(None, None, None)


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "report.json").read_text())["history"]
    return [step["loss"] for step in history["steps"]]


def on_one_rank(folder: Path, steps: int = 2) -> list[float]:
    """The same run on one rank of no network."""
    command = [sys.executable, "-m", "lhcp", "train", *small(steps), "--out", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=120)
    return losses(folder)


@pytest.mark.slow
def test_doctor_sees_both_nodes_and_the_slow_link(network: Nodes) -> None:
    """Fails if ranks of two nodes do not meet, or a link between them passes for one inside."""
    layer = ("--seqlen", "256", "--heads", "2", "--head-dim", "16")
    said = network.torchrun(2, ("-m", "lhcp", "doctor", *layer), 240)
    assert "links between the ranks [0, 1], [2, 3] are slow: 0.0" in said, said


@pytest.mark.slow
def test_training_meets_by_c10d_and_is_one_ranks(network: Nodes, tmp_path: Path) -> None:
    """Fails if launch/torchrun.sh's rendezvous does not find the other node, or a sequence and a
    layer over two nodes are trained to something else."""
    # No network of our own has a name server: each agent tells the others its address.
    head = {"HEAD_NODE": f"{network.address(0)}:29400", "NUM_NODES": "2", "PATH": PATH}
    head |= {"PYTHONPATH": str(ROOT), "GPUS_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": ""}
    mesh = ("--cp", "2", "--tp", "2", "--out", str(tmp_path / "two"))
    commands = [
        (
            *("env", f"LOCAL_ADDR={network.address(node)}"),
            *("bash", "launch/torchrun.sh", *small(), *mesh),
        )
        for node in (0, 1)
    ]
    before = network.sent_bytes(1)
    network.run(commands, 300, head)
    assert network.sent_bytes(1) - before > 100_000
    assert losses(tmp_path / "two") == pytest.approx(on_one_rank(tmp_path / "one"), rel=1e-5)
