"""Checkpoints: bit-for-bit resume, torn ones passed over, no code run from a file."""

import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from lhcp.training import checkpoint, checkpoint_files
from lhcp.training.data import open_data
from lhcp.training.history import EvalRecord, History, StepRecord
from lhcp.training.loop import train
from lhcp.training.parallel import build, whole_model
from lhcp.training.run import Run

RunRanks = Callable[..., list[Any]]


class Silent:
    """A watcher that can stop the run after a step, as a crash would."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.started_at = -1

        self.passed: list[str] = []
        self.numbers: list[tuple[float, ...]] = []

    def on_start(self, done: int, folder: Path) -> None:
        self.started_at = done

    def on_passed_over(self, said: str) -> None:
        self.passed.append(said)

    def on_step(self, record: StepRecord, stages: Any) -> None:
        self.numbers.append((record.step, record.loss, record.grad_norm, record.lr))
        if record.step == self.stop_after:
            raise InterruptedError

    def on_eval(self, record: EvalRecord) -> None:
        pass


def do(run: Run, watcher: Silent) -> tuple[dict[str, Any], History]:
    """Train `run` in its folder; return rank 0's whole weights and the history."""
    data = open_data(run.data, run.seqlen, run.seed)
    trainee = build(run, torch.device("cpu"))
    history = train(run, trainee, data, run.stages, run.folder, watcher)
    whole = whole_model(run, trainee)
    return {} if whole is None else dict(whole.state_dict()), history


def numbers(history: History) -> list[tuple[float, ...]]:
    """Return the history without its times."""
    return [(r.step, r.loss, r.grad_norm, r.lr) for r in history.steps] + [
        (r.step, r.loss) for r in history.evals
    ]


def stop_and_go_on(group: object, run: Run, stopped_at: int) -> list[bool]:
    """Tell whether a run stopped during step `stopped_at` ends as an undisturbed one does."""
    weights, history = do(replace(run, out=f"{run.out}/whole"), Silent())
    stopped = replace(run, out=f"{run.out}/stopped")
    with pytest.raises(InterruptedError):
        do(stopped, Silent(stop_after=stopped_at))
    watcher = Silent()
    again, more = do(stopped, watcher)
    same = all(torch.equal(weights[name], again[name]) for name in weights)
    started = watcher.started_at == (stopped_at - 1) // run.checkpoint_every * run.checkpoint_every
    return [same, weights.keys() == again.keys(), numbers(history) == numbers(more), started]


@pytest.mark.parametrize("stopped_at", [2, 3, 5], ids=["no checkpoint", "stage 1", "stage 2"])
def test_resume_is_bit_for_bit(
    one_rank: None, small_run: Run, tmp_path: Path, stopped_at: int
) -> None:
    assert stop_and_go_on(None, replace(small_run, out=str(tmp_path)), stopped_at) == [True] * 4


def test_resume_is_bit_for_bit_on_two_ranks(
    run_ranks: RunRanks, small_run: Run, tmp_path: Path
) -> None:
    run = replace(small_run, cp=2, out=str(tmp_path / "out"))
    assert run_ranks(2, stop_and_go_on, run, 4) == [[True] * 4] * 2


def go_on(group: object, run: Run) -> tuple[int, list[float]]:
    """Return where a run in its folder starts, and the losses of all its steps."""
    watcher = Silent()
    _, history = do(run, watcher)
    return watcher.started_at, [r.loss for r in history.steps]


def test_a_run_goes_on_with_other_ranks(
    one_rank: None, run_ranks: RunRanks, small_run: Run, tmp_path: Path
) -> None:
    run = replace(small_run, out=str(tmp_path / "out"))
    _, losses = go_on(None, replace(run, out=str(tmp_path / "whole")))
    with pytest.raises(InterruptedError):
        do(run, Silent(stop_after=3))
    started, meshed = run_ranks(2, go_on, replace(run, cp=2))[0]
    assert started == 2
    assert meshed == pytest.approx(losses, rel=1e-4)


@pytest.mark.slow
def test_a_run_over_nodes_goes_on_on_one_rank_and_on_them(
    one_rank: None, run_ranks: RunRanks, small_run: Run, tmp_path: Path
) -> None:
    """Fails if a checkpoint depends on nodes, or two such runs differ in a bit."""
    _, losses = go_on(None, replace(small_run, out=str(tmp_path / "one")))
    over_nodes = replace(small_run, cp=4, nodes=2, rotation="hybrid")
    assert run_ranks(4, stop_and_go_on, replace(over_nodes, out=str(tmp_path)), 3)[0] == [True] * 4
    stopped = tmp_path / "stopped"
    for step in ("step-00000004", "step-00000005"):
        shutil.rmtree(stopped / step)
    started, alone = go_on(None, replace(small_run, out=str(stopped)))
    assert started == 2
    assert alone == pytest.approx(losses, rel=1e-4)


def test_another_run_is_refused(one_rank: None, small_run: Run, tmp_path: Path) -> None:
    run = replace(small_run, out=str(tmp_path))
    do(run, Silent())
    said = r"differs in global_batch: 4 there, 2 here; seed: 0 there, 1 here.*--out.*--accept"
    with pytest.raises(ValueError, match=said):
        do(replace(run, global_batch=2, seed=1), Silent())


@pytest.fixture
def saved(one_rank: None, small_run: Run, tmp_path: Path) -> Path:
    """A folder with checkpoints after 2, 4 and 5 steps."""
    do(replace(small_run, out=str(tmp_path)), Silent())
    assert [p.name for p in sorted(tmp_path.iterdir())] == [
        "step-00000002",
        "step-00000004",
        "step-00000005",
    ]
    return tmp_path


def cut_short(path: Path) -> None:
    data = next(path.glob("*.distcp"))
    os.truncate(data, data.stat().st_size // 2)


def drop_data(path: Path) -> None:
    next(path.glob("*.distcp")).unlink()


def drop_marker(path: Path) -> None:
    (path / checkpoint_files.COMPLETE).unlink()


def cut_marker(path: Path) -> None:
    os.truncate(path / checkpoint_files.COMPLETE, 9)


def leave_unfinished(path: Path) -> None:
    path.rename(path.with_suffix(checkpoint_files.UNFINISHED))


@pytest.mark.parametrize(
    "damage", [cut_short, drop_data, drop_marker, cut_marker, leave_unfinished]
)
def test_torn_checkpoints_are_passed_over(saved: Path, damage: Callable[[Path], None]) -> None:
    damage(saved / "step-00000005")
    assert checkpoint.latest(saved) == saved / "step-00000004"
    damage(saved / "step-00000004")
    damage(saved / "step-00000002")
    if damage is leave_unfinished:
        assert checkpoint.latest(saved) is None
        return
    said = r"none can be taken.*step-00000005: .*step-00000004: .*remove .* to start anew"
    with pytest.raises(checkpoint.NoCheckpointLeft, match=said):
        checkpoint.latest(saved)


def test_only_the_last_are_kept(one_rank: None, small_run: Run, tmp_path: Path) -> None:
    do(replace(small_run, out=str(tmp_path), checkpoint_every=1, keep_checkpoints=2), Silent())
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000004", "step-00000005"]


def test_marked_checkpoints_stay(one_rank: None, small_run: Run, tmp_path: Path) -> None:
    """Fails if a checkpoint that others begin from is dropped, or another one is not."""
    trainee = build(small_run, torch.device("cpu"))
    for step in range(1, 5):
        state = trainee.model, trainee.optimizer
        checkpoint.save(tmp_path, step, *state, beside={}, keep=1, marks={2})
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000002", "step-00000004"]


def test_a_run_begins_from_another_only_while_it_has_nothing(saved: Path) -> None:
    """Fails if a run goes back to where it began, or starts anew where that is damaged."""
    begin, own = saved / "step-00000004", saved / "own"
    assert checkpoint.latest(own, begin) == begin
    assert checkpoint.latest(saved, begin) == saved / "step-00000005"
    cut_short(begin)
    with pytest.raises(ValueError, match=r"step-00000004: no whole checkpoint.*own was to begin"):
        checkpoint.latest(own, begin)


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def mark_whole(path: Path) -> None:
    """Make the list of files fit what is there."""
    record = checkpoint_files.Record.read(path)
    names = {p.name for p in path.iterdir()} - {checkpoint_files.COMPLETE}
    record = replace(record, files=checkpoint_files.describe(path, names))
    (path / checkpoint_files.COMPLETE).write_text(record.to_text())


def test_metadata_that_runs_code_is_refused(saved: Path, small_run: Run, tmp_path: Path) -> None:
    path = saved / "step-00000005"
    (path / ".metadata").write_bytes(pickle.dumps(Attack(tmp_path / "ran")))
    mark_whole(path)
    with pytest.raises(checkpoint.UnsafeCheckpointError, match="mkdir"):
        do(replace(small_run, out=str(saved)), Silent())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("entry", ["rng", "model.norm.weight"])
def test_data_that_runs_code_is_refused(
    saved: Path, small_run: Run, tmp_path: Path, entry: str
) -> None:
    # torch unpickles an entry that the metadata calls bytes, whatever the program asked for.
    path = saved / "step-00000005"
    state = {entry: Attack(tmp_path / "ran")} if "." not in entry else {}
    if not state:
        state = {"model": {"norm.weight": Attack(tmp_path / "ran")}}
    (path / ".metadata").unlink()
    dcp.save(state, storage_writer=dcp.FileSystemWriter(path))
    mark_whole(path)
    with pytest.raises(checkpoint.UnsafeCheckpointError):
        do(replace(small_run, out=str(saved)), Silent())
    assert not (tmp_path / "ran").exists()


def test_the_attack_works_on_torchs_own_reader(saved: Path, tmp_path: Path) -> None:
    path = saved / "step-00000005"
    (path / ".metadata").write_bytes(pickle.dumps(Attack(tmp_path / "ran")))
    with pytest.raises(AttributeError):
        dcp.FileSystemReader(path).read_metadata()
    assert (tmp_path / "ran").exists()


def test_metadata_cannot_point_outside(saved: Path) -> None:
    path = saved / "step-00000005"
    metadata = dcp.FileSystemReader(path).read_metadata()
    for info in metadata.storage_data.values():
        info.relative_path = "../step-00000004/" + info.relative_path
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(checkpoint.UnsafeCheckpointError, match="outside its folder"):
        checkpoint.TensorReader(path).read_metadata()


@pytest.mark.slow
def test_a_run_goes_on_from_two_ranks_to_four_to_one(
    one_rank: None, run_ranks: RunRanks, small_run: Run, tmp_path: Path
) -> None:
    """Fails if a step after a change of ranks is another, from lighthouse into dense too: it is
    that of the ranks which wrote the checkpoint."""
    run = replace(small_run, out=str(tmp_path / "out"), checkpoint_every=1, keep_checkpoints=9)
    two, four = replace(run, cp=2), replace(run, cp=4)
    assert run_ranks(2, first_steps, two, 3) == [(0, [1, 2, 3])] * 2
    on_two = run_ranks(2, next_losses, replace(two, out=copied(run, tmp_path / "two")), 4)[0]
    assert run_ranks(4, next_losses, four, 4)[0] == pytest.approx(on_two, rel=1e-5)
    on_four = run_ranks(4, next_losses, replace(four, out=copied(run, tmp_path / "four")), 5)[0]
    assert next_losses(None, run, 5) == pytest.approx(on_four, rel=1e-5)


def copied(run: Run, to: Path) -> str:
    shutil.copytree(run.folder, to)
    return str(to)


def first_steps(group: object, run: Run, last: int) -> tuple[int, list[int]]:
    watcher = Silent(stop_after=last + 1)
    with pytest.raises(InterruptedError):
        do(run, watcher)
    return watcher.started_at, [int(step) for step, *_ in watcher.numbers[:-1]]


def next_losses(group: object, run: Run, step: int) -> tuple[float, ...]:
    """Return the numbers of step `step`, which is the next one, and do it for the folder."""
    watcher = Silent(stop_after=step + 1)
    with pytest.raises(InterruptedError) if step < 5 else nullcontext():
        do(run, watcher)
    assert watcher.started_at == step - 1
    return watcher.numbers[0]
