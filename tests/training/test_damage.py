"""Checkpoints that were damaged, or cannot be written: passed over, kept and said, never silent."""

import errno
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from lhcp.training import checkpoint, checkpoint_files, loop
from lhcp.training.checkpoint import NoCheckpointLeft, SaveFailed
from lhcp.training.checkpoint_files import Record, checkpoints_in
from lhcp.training.parallel import Trainee, build
from lhcp.training.run import Run
from lhcp.training.shared_folder import FolderNotShared, prove_shared
from lhcp.training.step import train_step
from tests.training.test_checkpoint import Silent, do, mark_whole, numbers

RunRanks = Callable[..., list[Any]]
CPU = torch.device("cpu")


def flip(path: Path) -> None:
    """Turn the bits of one byte in the middle of the tensors; the size stays."""
    data = next(path.glob("*.distcp"))
    written = bytearray(data.read_bytes())
    written[len(written) // 2] ^= 255
    data.write_bytes(written)


def flip_history(path: Path) -> None:
    """Turn one digit of what is kept beside the tensors."""
    record = path / checkpoint_files.COMPLETE
    text = record.read_text()
    at = text.index('"loss": ') + len('"loss": ')
    record.write_text(text[:at] + str(9 - int(text[at])) + text[at + 1 :])


def spoil(path: Path) -> None:
    """Leave what has its digest and cannot be loaded: a file that is no file of tensors."""
    data = next(path.glob("*.distcp"))
    data.write_bytes(b"x" * data.stat().st_size)
    mark_whole(path)


def forget_tensor(path: Path) -> None:
    """Leave metadata, with its digest, that lacks a weight."""
    found = checkpoint.TensorReader(path).read_metadata()
    found.state_dict_metadata.pop("model.norm.weight")
    with open(path / ".metadata", "wb") as file:
        pickle.dump(found, file)
    mark_whole(path)


def trained(run: Run, folder: Path) -> Path:
    """Return a folder with checkpoints after 2, 4 and 5 steps."""
    do(replace(run, out=str(folder)), Silent())
    return folder


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("damage", [flip, flip_history, spoil, forget_tensor])
def test_a_damaged_one_is_passed_over_and_the_bits_are_the_same(
    small_run: Run, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """Fails if damage of equal size is resumed from, ends the run, or leaves something behind."""
    run = replace(small_run, out=str(tmp_path))
    weights, history = do(run, Silent())
    damage(tmp_path / "step-00000005")
    watcher = Silent()
    again, more = do(run, watcher)
    assert watcher.started_at == 4
    assert len(watcher.passed) == 1 and "step-00000005 is passed over: " in watcher.passed[0]
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert numbers(history) == numbers(more)
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000005"


@pytest.mark.usefixtures("one_rank")
def test_a_run_does_not_start_anew_beside_damaged_ones(small_run: Run, tmp_path: Path) -> None:
    """Fails if a run whose checkpoints are all damaged begins at step 0, or removes one."""
    folder = trained(small_run, tmp_path)
    for path in folder.iterdir():
        flip(path)
    before = sorted(folder.rglob("*"))
    watcher = Silent()
    with pytest.raises(NoCheckpointLeft, match=r"00005: .*digest.*00002: .*remove .* to start"):
        do(replace(small_run, out=str(folder)), watcher)
    assert watcher.started_at == -1 and len(watcher.passed) == 3
    assert sorted(folder.rglob("*")) == before


def flip_and_look(group: object, run: Run) -> tuple[str, list[str]]:
    """Train on these ranks, flip a byte of each rank's file in turn, and look."""
    folder = trained(run, run.folder)
    if dist.get_rank() == 0:
        for index, path in enumerate(sorted(folder.glob("step-*"))[:2]):
            data = path / f"__{index}_0.distcp"
            data.write_bytes(bytes(reversed(data.read_bytes())))
    dist.barrier()
    said: list[str] = []
    found = checkpoint.latest(folder, None, said.append)
    return str(found), [checkpoint_files.trouble_with(p) for p in sorted(folder.glob("step-*"))]


def test_every_ranks_file_is_read_by_one(
    run_ranks: RunRanks, small_run: Run, tmp_path: Path
) -> None:
    """Fails if a file of some rank is digested by none, or ranks disagree on what they found."""
    run = replace(small_run, cp=2, out=str(tmp_path / "out"))
    (found, troubles), other = run_ranks(2, flip_and_look, run)
    assert (found, troubles) == other and found.endswith("step-00000005")
    assert "__0_0.distcp is not as it was written" in troubles[0]
    assert "__1_0.distcp is not as it was written" in troubles[1]
    assert troubles[2] == ""


def state_of(trainee: Trainee) -> tuple[Any, Any]:
    return trainee.model, trainee.optimizer


@pytest.mark.usefixtures("one_rank")
def test_only_whole_ones_count_and_strangers_stay(small_run: Run, tmp_path: Path) -> None:
    """Fails if a damaged or newer folder takes the place of a whole one, or a stranger goes."""
    trainee = build(small_run, CPU)
    strangers = ["step-backup1", "step-00000001", "step-7", "notes"]
    for name in strangers:
        (tmp_path / name).mkdir()
    for step in (2, 3, 4, 9):
        checkpoint.save(tmp_path, step, *state_of(trainee), beside={}, keep=9)
    flip(tmp_path / "step-00000004")
    flip(tmp_path / "step-00000009")
    checkpoint.save(tmp_path, 5, *state_of(trainee), beside={}, keep=2)
    steps = [f"step-{step:08d}" for step in (3, 4, 5, 9)]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(strangers + steps)
    # Alone, the one just written is all that counts.
    checkpoint.save(tmp_path, 6, *state_of(trainee), beside={}, keep=1)
    assert [p.name for p in checkpoints_in(tmp_path)][:2] == ["step-00000009", "step-00000006"]


@pytest.mark.usefixtures("one_rank")
def test_all_of_a_checkpoint_is_on_the_disk_before_its_name(
    small_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a machine that loses power may leave a name whose files it had not written yet."""
    trainee, done = build(small_run, CPU), list[str]()
    fsync, rename = os.fsync, Path.rename

    def note_sync(handle: int) -> None:
        fsync(handle)
        # Torch writes its metadata under another name first.
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name.removesuffix(".tmp"))

    def note_rename(path: Path, target: Path) -> Path:
        done.append(f"named {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    path = checkpoint.save(tmp_path, 1, *state_of(trainee), beside={}, keep=1)
    at = done.index(f"named {path.name}")
    assert {file.name for file in path.iterdir()} | {f"{path.name}.unfinished"} <= {*done[:at]}
    assert tmp_path.name in done[at:]


def fill_the_disk(group: object, run: Run, rank: int) -> tuple[str, list[str]]:
    """Save twice, the second time on a disk that is full for one rank; return what is said."""
    trainee = build(run, CPU)
    checkpoint.save(run.folder, 1, *state_of(trainee), beside={}, keep=1)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    here = dist.get_rank() == rank
    with patch.object(os, "fsync", full if here else os.fsync), pytest.raises(SaveFailed) as error:
        checkpoint.save(run.folder, 2, *state_of(trainee), beside={}, keep=1)
    return str(error.value), sorted(p.name for p in run.folder.iterdir())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_is_said_on_all_ranks(
    run_ranks: RunRanks, small_run: Run, tmp_path: Path, rank: int
) -> None:
    """Fails if a rank goes on alone, or the checkpoint before is lost."""
    run = replace(small_run, cp=2, out=str(tmp_path / "out"))
    first, second = run_ranks(2, fill_the_disk, run, rank)
    assert first == second
    said, there = first
    assert f"the disk is full: rank {rank}: OSError" in said
    assert "step-00000001 stays the newest; make room" in said
    assert there == ["step-00000001"]


def save_apart(group: object, folder: Path) -> list[str]:
    """Prove and save where each rank has a folder of its own, as on storage that is not shared."""
    own = folder / f"host{dist.get_rank()}"
    with pytest.raises(FolderNotShared) as proof:
        prove_shared(own, patience=0.3)
    with (
        patch.object(checkpoint_files.wait_until_seen, "__defaults__", (0.3,)),
        pytest.raises(SaveFailed) as save,
    ):
        write_something(own)
    return [str(proof.value), str(save.value), str(sorted(p.name for p in own.iterdir()))]


def write_something(folder: Path) -> None:
    torch.manual_seed(dist.get_rank())
    model = torch.nn.Linear(3, 3)
    checkpoint.save(folder, 1, model, torch.optim.SGD(model.parameters()), beside={}, keep=1)


def test_storage_that_is_not_shared_is_found(run_ranks: RunRanks, tmp_path: Path) -> None:
    """Fails if saves succeed whose shards another host cannot see, at the start or at the save."""
    first, second = run_ranks(2, save_apart, tmp_path)
    for proof, save, there in (first, second):
        assert "ranks [1] of 2 and rank 0 do not see one another's files" in proof
        assert "which another rank wrote, is not seen here: --out must be on storage" in save
        assert "step-00000001'" not in there and "token" not in there


def prove_closed(group: object, folder: Path) -> str:
    """Prove a folder in which rank 1 cannot make a file: for it, a file stands in the way."""
    own = folder / ("closed" if dist.get_rank() else "open")
    with pytest.raises(FolderNotShared) as error:
        prove_shared(own, patience=0.3)
    return str(error.value)


def test_a_folder_that_a_rank_cannot_write_is_said(run_ranks: RunRanks, tmp_path: Path) -> None:
    """Fails if a rank learns at its first save that it cannot write."""
    (tmp_path / "closed").write_text("")
    first, second = run_ranks(2, prove_closed, tmp_path)
    assert first.split(": ", 1)[1] == second.split(": ", 1)[1]
    assert "not every rank can write there (rank 1: FileExistsError" in first


def save_nan(group: object, run: Run) -> tuple[str, list[str]]:
    """Save, then spoil a weight that one rank holds, and save again."""
    trainee = build(run, CPU)
    checkpoint.save(run.folder, 1, *state_of(trainee), beside={}, keep=1)
    if dist.get_rank() == dist.get_world_size() - 1:
        with torch.no_grad():
            trainee.model.head.weight.to_local()[-1] = float("nan")
    with pytest.raises(FloatingPointError) as error:
        checkpoint.save(run.folder, 2, *state_of(trainee), beside={}, keep=1)
    return str(error.value), [p.name for p in run.folder.iterdir()]


def test_weights_that_are_not_finite_are_not_saved(
    run_ranks: RunRanks, small_run: Run, tmp_path: Path
) -> None:
    """Fails if NaN weights become the newest checkpoint, or one rank alone refuses."""
    run = replace(small_run, cp=2, out=str(tmp_path / "out"))
    first, second = run_ranks(2, save_nan, run)
    assert first == second and first[1] == ["step-00000001"]
    assert "after step 2 head.weight is not finite on rank 1" in first[0]
    assert "step-00000001 stays the newest" in first[0]


@pytest.mark.usefixtures("one_rank")
def test_an_end_that_is_not_finite_is_an_error(small_run: Run, tmp_path: Path) -> None:
    """Fails if the last step's weights, which no loss has seen yet, end a run as a success."""
    run = replace(small_run, lighthouse_steps=0, dense_steps=1, out=str(tmp_path))

    def overshoot(run: Run, trainee: Trainee, *rest: Any) -> Any:
        record = train_step(run, trainee, *rest)
        with torch.no_grad():
            trainee.model.norm.weight.to_local()[0] = float("inf")
        return record

    said = r"after step 1 norm.weight is not finite.*has none before"
    with patch.object(loop, "train_step", overshoot), pytest.raises(FloatingPointError, match=said):
        do(run, Silent())
    assert checkpoints_in(tmp_path) == []


@pytest.mark.usefixtures("one_rank")
def test_a_nan_checkpoint_of_before_is_passed_over(small_run: Run, tmp_path: Path) -> None:
    """Fails if a checkpoint with NaN weights, written before they were checked, is resumed from."""
    run = replace(small_run, out=str(tmp_path))
    trained(run, tmp_path)
    beside = Record.read(tmp_path / "step-00000005").beside
    trainee = build(run, CPU)
    with torch.no_grad():
        trainee.model.norm.weight.to_local()[0] = float("nan")
    with patch.object(checkpoint, "not_finite", lambda state: []):
        checkpoint.save(tmp_path, 5, *state_of(trainee), beside=beside, keep=3)
    watcher = Silent()
    do(run, watcher)
    assert watcher.started_at == 4 and "norm.weight is not finite" in watcher.passed[0]


@pytest.mark.usefixtures("one_rank")
def test_checkpoints_of_before_digests_are_taken(small_run: Run, tmp_path: Path) -> None:
    """Fails if a checkpoint whose record has sizes alone is refused."""
    folder = trained(small_run, tmp_path)
    path = folder / "step-00000005"
    record = Record.read(path)
    sizes = {name: size for name, (size, _) in record.files.items()}
    about = {"step": 5, "files": sizes, "beside": record.beside}
    (path / checkpoint_files.COMPLETE).write_text(json.dumps(about))
    assert checkpoint.latest(folder) == path
