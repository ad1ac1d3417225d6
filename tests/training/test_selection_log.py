"""Diagnosing layers in training: what is recorded, on which meshes, and that nothing else moves."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lhcp
from lhcp.training import checkpoint, report
from lhcp.training.data import DataConfig, open_data
from lhcp.training.history import History
from lhcp.training.loop import train
from lhcp.training.parallel import build, whole_model
from lhcp.training.run import Run
from lhcp.training.selection_log import SelectionRecord, diagnose_layers
from lhcp.training.selection_picture import draw_selections
from tests.training.test_checkpoint import Silent

RunRanks = Callable[..., list[Any]]


@pytest.fixture
def run(small_run: Run, tmp_path: Path) -> Run:
    """Three lighthouse and two dense steps; layer 0 selects, layer 1 is dense."""
    text = tmp_path / "text"
    text.write_bytes(bytes(range(32, 127)) * 400)
    data = DataConfig(text=(str(text),), heldout=0.2)
    return replace(small_run, data=data, diagnose=True, out=str(tmp_path / "run"))


def do(group: object, run: Run, name: str) -> tuple[History, dict[str, torch.Tensor]]:
    """Train, and return the history and rank 0's weights."""
    trainee = build(run, torch.device("cpu"))
    data = open_data(run.data, run.seqlen, run.seed)
    history = train(run, trainee, data, run.stages, Path(f"{run.out}_{name}"), Silent())
    whole = whole_model(run, trainee)
    return history, {} if whole is None else whole.state_dict()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("recompute", [False, True])
def test_diagnosing_changes_no_bit(run: Run, recompute: bool) -> None:
    """Fails if a look at q and k, a hook left behind or a mode reaches a step."""
    run = replace(run, recompute=recompute)
    (seen, a), (blind, b) = (do(None, replace(run, diagnose=on), str(on)) for on in (True, False))
    assert [r.loss for r in seen.steps] == [r.loss for r in blind.steps]
    assert [r.grad_norm for r in seen.steps] == [r.grad_norm for r in blind.steps]
    assert seen.evals == blind.evals and blind.selections == []
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.usefixtures("one_rank")
def test_records_come_at_step_0_and_each_evaluation(run: Run) -> None:
    """Fails if a layer that always attends densely is diagnosed, or a moment is missing."""
    history, _ = do(None, run, "records")
    found = [(r.step, r.layer, r.mode) for r in history.selections]
    modes = {0: "lighthouse", 2: "lighthouse", 3: "lighthouse", 4: "dense", 5: "dense"}
    assert found == [(step, 0, mode) for step, mode in modes.items()]
    assert History.from_json(asdict(history)) == history
    # Checkpoints of before have no such list.
    old = {name: value for name, value in asdict(history).items() if name != "selections"}
    assert History.from_json(old).selections == []


@pytest.mark.usefixtures("one_rank")
def test_a_record_is_what_diagnose_says_of_the_layers_inputs(run: Run) -> None:
    """Fails if what is hooked is not the q and k that the layer attends with."""
    trainee = build(run, torch.device("cpu"))
    data = open_data(run.data, run.seqlen, run.seed)
    (record,) = diagnose_layers(run, trainee, data.heldout, "lighthouse", 7)
    seen: list[Any] = []
    core = trainee.model.blocks[0].get_submodule("attention.core")
    handle = core.register_forward_pre_hook(lambda module, qkv: seen.append(qkv))
    tokens = data.heldout.batch(0, 0, 1, run.eval_sequences).tokens
    with torch.no_grad():
        trainee.model(tokens, trainee.placement.positions)
    handle.remove()
    ((q, k, _),) = seen
    wanted = lhcp.diagnose(q, k, run.lighthouse)
    assert record == SelectionRecord(
        7, 0, "lighthouse", wanted.spread_q, wanted.spread_k, wanted.near_ties, wanted.overlap
    )


@pytest.mark.usefixtures("one_rank")
def test_hooks_leave_with_the_diagnosis(run: Run) -> None:
    """Fails if a hook stays on a layer, also after an error."""
    trainee = build(run, torch.device("cpu"))
    heldout = open_data(run.data, run.seqlen, run.seed).heldout
    broken = replace(run, kernels="nobody's")
    with pytest.raises(ValueError, match="nobody's"):
        diagnose_layers(broken, trainee, heldout, "lighthouse", 0)
    core = trainee.model.blocks[0].get_submodule("attention.core")
    assert not core._forward_pre_hooks


def first_records(group: object, run: Run) -> list[SelectionRecord]:
    trainee = build(run, torch.device("cpu"))
    heldout = open_data(run.data, run.seqlen, run.seed).heldout
    return diagnose_layers(run, trainee, heldout, "lighthouse", 0)


def numbers(record: SelectionRecord) -> list[float | None]:
    return [record.spread_q, record.spread_k, record.near_ties, record.overlap]


def test_the_same_on_two_ranks_of_a_sequence(run_ranks: RunRanks, run: Run) -> None:
    """Fails if ranks diagnose their own tokens alone, or sum in another order of messages."""
    (one,) = run_ranks(1, first_records, run)
    for records in run_ranks(2, first_records, replace(run, cp=2)):
        assert numbers(records[0]) == pytest.approx(numbers(one[0]), rel=1e-4)


def test_two_sequences_are_averaged(run_ranks: RunRanks, run: Run) -> None:
    """Fails if data-parallel ranks keep records of their own: only one of them is written."""
    first, second = run_ranks(2, first_records, run)
    assert first == second


@pytest.mark.usefixtures("one_rank")
def test_it_may_be_asked_for_on_the_way(run: Run) -> None:
    """Fails if a run that was not diagnosed cannot be from its checkpoint on."""
    three = replace(run, dense_steps=0, diagnose=False)
    do(None, three, "way")
    history, _ = do(None, run, "way")
    assert [r.step for r in history.selections] == [4, 5]
    found = checkpoint.latest(Path(f"{run.out}_way"))
    assert found is not None
    assert len(checkpoint.read_beside(found)[1]["history"]["selections"]) == 2


@pytest.mark.usefixtures("one_rank")
def test_the_report_has_numbers_and_picture(run: Run, tmp_path: Path) -> None:
    """Fails if report.json or the picture misses the layers."""
    history, _ = do(None, run, "report")
    summary = report.summarize(run, history, None, world_size=1)
    report.write(summary, tmp_path / "out")
    assert '"selections"' in (tmp_path / "out/report.json").read_text()
    assert (tmp_path / "out/selection.png").read_bytes().startswith(b"\x89PNG")
    quiet = replace(history, selections=[])
    report.write(report.summarize(run, quiet, None, world_size=1), tmp_path / "quiet")
    assert not (tmp_path / "quiet/selection.png").exists()


def test_one_kv_head_has_a_picture(tmp_path: Path) -> None:
    """Fails if a number that is None stops the drawing."""
    record = SelectionRecord(0, 3, "dense", 0.1, 0.2, 0.0, None)
    draw_selections([asdict(record)], tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()
