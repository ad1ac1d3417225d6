"""What measures and examines, on a GPU: clocks of the host and the GPU, graphs, libnccl, memory."""

import json
import subprocess
import sys
from pathlib import Path

import torch

import lhcp
from lhcp.comm.mesh import Ranks
from lhcp.measure.clock import launched_seconds, seconds_of
from lhcp.measure.doctor import Patient, examine
from lhcp.measure.rates import host_seconds
from tests.gpu.problems import LayerProblem
from tests.gpu.test_graphs import Model

ROOT = Path(__file__).parents[2]
PROBLEM = LayerProblem(num_heads=4, num_kv_heads=2, head_dim=64)


def test_the_doctor_sees_the_gpu() -> None:
    """Fails if the card, NCCL or a backend is not named, or a layer is not timed by both clocks."""
    device = torch.device("cuda", torch.cuda.current_device())
    patient = Patient(
        seqlen=32_768, num_heads=8, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16
    )
    found = examine(Ranks(), device, patient)
    facts = found.facts[0]
    assert torch.cuda.get_device_name(device) in facts["device"] and "GiB free" in facts["memory"]
    assert facts["nccl"].count(".") == 2 and facts["libnccl"]
    said = str(found)
    assert "backend   cpu         cannot: inputs are on cuda" in said and "taken: " in said
    assert "of which its host launches for" in said


def test_a_graph_is_timed_without_its_host() -> None:
    """Fails if a short kernel's time is that of its launch, or a long one's another in a graph."""
    device = torch.device("cuda", torch.cuda.current_device())
    small, large = (torch.zeros(n, device=device) for n in (1, 2**28))
    assert launched_seconds(lambda: small.add_(1), device) < 0.7 * host_seconds(
        lambda: small.add_(1), device
    )
    plain = seconds_of(lambda: large.add_(1), device)
    assert 0.8 < launched_seconds(lambda: large.add_(1), device) / plain < 1.25


def test_a_budget_is_kept_with_compiling_in_it() -> None:
    """Fails if rounds are planned by a first one in which Triton compiles."""
    report = lhcp.measure_overhead(
        lhcp.LighthouseConfig.fit(16_384), seqlen=16_384, num_heads=8, budget=20, progress=False
    )
    assert len(report.phases) == 3 and report.setting["repeats"] >= 10
    assert report.phase("both").host is not None and "One rank" in str(report)


def test_a_graphed_model_is_measured_and_stays_graphed() -> None:
    """Fails if the twin replays the messages' graphs, or the model's own are lost."""
    model = Model(PROBLEM)
    graphs = lhcp.graphed(model, always=True)
    q, k, v, dout = PROBLEM.draw(0)

    def step() -> None:
        model(q, k, v).backward(dout)

    for _ in range(3):
        step()
    before = graphs.eager.total()
    cost = lhcp.measure_step(step, model, repeats=5, warmup=3, progress=False)
    step()
    assert cost.num_layers == 3 and cost.real.median > 0 and cost.silent.median > 0
    assert all(layer.graphs is graphs for layer in model.layers)
    assert graphs.eager.total() == before


def test_training_tells_memory_and_utilization(tmp_path: Path) -> None:
    """Fails if the progress line or metrics.jsonl lack what a GPU tells."""
    short = ("--lighthouse-steps", "6", "--dense-steps", "2", "--sample-bytes", "0")
    done = subprocess.run(
        [sys.executable, "-m", "lhcp", "train", "tiny", "--out", str(tmp_path), *short],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "  mem " in done.stdout
    lines = (tmp_path / "two_stages" / "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if record["kind"] == "step"]
    assert all(record["peak_gib"] > 0 for record in steps)
    assert all(record["mfu"] is None or 0 < record["mfu"] < 1 for record in steps)
