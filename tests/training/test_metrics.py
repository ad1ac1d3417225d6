"""Metrics of a run: each step once in the file, also of one that goes on; logs, profile, MFU."""

import gzip
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lhcp.comm.mesh import Ranks
from lhcp.training import efficiency
from lhcp.training.data import DataConfig, open_data
from lhcp.training.efficiency import flops_per_token
from lhcp.training.history import EvalRecord, StepRecord
from lhcp.training.loop import train
from lhcp.training.metrics import NAME, JsonLines, scalars, written
from lhcp.training.parallel import build
from lhcp.training.placement import Placement
from lhcp.training.progress import Progress, use_of
from lhcp.training.run import Run

STEP = StepRecord(3, "lighthouse", 1.5, 0.5, 1e-3, 0.2, 100.0, None, 1.25, 0.4)


@pytest.fixture
def run(small_run: Run, tmp_path: Path) -> Run:
    text = tmp_path / "text"
    text.write_bytes(bytes(range(32, 127)) * 400)
    data = DataConfig(text=(str(text),), heldout=0.2)
    return replace(small_run, data=data, out=str(tmp_path / "out"))


def do(run: Run) -> None:
    """Train on this process, watched as `lhcp train` does."""
    trainee, data = build(run, torch.device("cpu")), open_data(run.data, run.seqlen, run.seed)
    with written(run, Progress(shown=False), 0) as watcher:
        train(run, trainee, data, run.stages, run.folder / "two_stages", watcher)


def lines(run: Run) -> list[dict[str, Any]]:
    text = (run.folder / "two_stages" / NAME).read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.usefixtures("one_rank")
def test_each_step_has_one_line_also_when_a_run_goes_on(run: Run) -> None:
    """Fails if a step or an evaluation is missing or twice, or one that is done again stays."""
    do(replace(run, dense_steps=1))
    first = lines(run)
    # Steps after the checkpoint that is gone on from, and a line that was cut off.
    path = run.folder / "two_stages" / NAME
    path.write_text(path.read_text() + json.dumps({"kind": "step", "step": 9}) + '\n{"kind": "st')
    do(run)
    again = lines(run)
    assert again[: len(first)] == first
    assert [r["step"] for r in again if r["kind"] == "step"] == [1, 2, 3, 4, 5]
    evals = [(r["step"], r["mode"]) for r in again if r["kind"] == "eval"]
    assert len(evals) == len(set(evals)) and evals[-1] == (5, "dense")
    assert all(r["loss"] > 0 for r in again)


def test_a_full_disk_ends_the_file_and_not_the_run(tmp_path: Path) -> None:
    said: list[str] = []
    log = JsonLines(said.append)
    (tmp_path / "arm").write_text("no folder")
    log.on_start(0, tmp_path / "arm")
    log.on_step(STEP, ())
    log.close()
    assert len(said) == 1 and f"{NAME} is not written on: " in said[0]


def test_numbers_have_names_and_none_is_no_number() -> None:
    found = scalars(STEP)
    assert found["train/loss"] == 1.5 and found["speed/mfu"] == 0.4
    assert not [name for name in found if "rotation" in name or "stage" in name]
    assert scalars(EvalRecord(3, "dense", "dense", 2.0)) == {"heldout/dense": 2.0}


@pytest.mark.usefixtures("one_rank")
def test_tensorboard_reads_the_curves(run: Run) -> None:
    """Fails if a curve is missing, or a step that is done again is there twice."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = replace(run, logs=("tensorboard",))
    do(replace(run, dense_steps=1))
    do(run)
    events = EventAccumulator(str(run.folder / "two_stages" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    losses = [r["loss"] for r in lines(run) if r["kind"] == "eval" and r["mode"] == "dense"]
    found = [event.value for event in events.Scalars("heldout/dense")]
    assert found == pytest.approx(losses, rel=1e-6)


@pytest.mark.usefixtures("one_rank")
def test_wandb_has_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if wandb, offline, does not take what it is sent."""
    pytest.importorskip("wandb")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    do(replace(run, logs=("wandb",)))
    (found,) = (run.folder / "two_stages" / "wandb").glob("offline-run-*/run-*.wandb")
    # A process of wandb's own writes it.
    deadline = time.monotonic() + 30
    while found.stat().st_size <= 500:
        assert time.monotonic() < deadline, found.stat()
        time.sleep(0.1)


def test_a_log_whose_package_is_missing_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with (
        pytest.raises(ImportError, match="pip install wandb"),
        written(replace(run, logs=("wandb",)), Progress(shown=False), 0),
    ):
        raise AssertionError("nothing is trained")


@pytest.mark.usefixtures("one_rank")
def test_a_profile_names_the_stages(run: Run) -> None:
    """Fails if the trace has no step of ours, or a run of few steps says nothing."""
    do(replace(run, profile=1))
    with gzip.open(run.folder / "two_stages" / "profile" / "rank0.json.gz") as file:
        names = {str(event.get("name")) for event in json.load(file)["traceEvents"]}
    assert [name for name in names if name.startswith("lhcp::")]


def placed(device: str, dp: int) -> Placement:
    where = torch.device(device)
    return Placement(where, 0, dp, 1, Ranks(), "auto", torch.zeros(0), "zigzag", False)


def test_mfu_is_of_the_models_flops(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if ranks, the mode or the card's peak do not count, or an unknown card has a peak."""

    def name(card: str) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)

    name("NVIDIA H200")
    cp2 = replace(run, cp=2)
    dense = efficiency.utilization(cp2, "dense", 1e6, placed("cuda", 3))
    assert dense == pytest.approx(flops_per_token(run.model, run.seqlen) * 1e6 / 6 / 9.89e14)
    sparse = efficiency.utilization(cp2, "lighthouse", 1e6, placed("cuda", 3))
    assert sparse is not None and dense is not None and sparse < dense
    fp32 = replace(cp2, dtype="fp32")
    assert efficiency.utilization(fp32, "dense", 1e6, placed("cuda", 3)) is None
    assert efficiency.utilization(cp2, "dense", 1e6, placed("cpu", 3)) is None
    name("NVIDIA Unheard Of")
    assert efficiency.utilization(cp2, "dense", 1e6, placed("cuda", 3)) is None
    cards = {"NVIDIA H100 80GB HBM3": 9.89e14, "NVIDIA H100 PCIe": 7.56e14, "NVIDIA GB200": 2.5e15}
    assert {card: efficiency.peak_flops(card) for card in cards} == cards


def test_the_progress_line_has_what_is_known() -> None:
    assert use_of(STEP) == "  mem 1.2 GiB  MFU 40%"
    assert use_of(replace(STEP, peak_gib=None, mfu=None)) == ""
