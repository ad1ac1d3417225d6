"""Checkpoints with torch.distributed.checkpoint: atomic, checked, loaded without running code.

A checkpoint is a folder `step-00000100`: what torch wrote, and `complete.json`, the list of its
files with sizes and digests and whatever the caller keeps beside the tensors. It is written under
another name, looked at by every rank and renamed when complete, so a folder of that name is whole,
or was damaged later: then the digests show it, and the one before it is taken, in words.
"""

import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader

from lhcp.training.checkpoint_files import (
    UNFINISHED,
    DamagedCheckpoint,
    Record,
    checkpoints_in,
    disk_is_full,
    prune,
    trouble_with,
)
from lhcp.training.checkpoint_reader import TensorReader, UnsafeCheckpointError
from lhcp.training.checkpoint_writer import write
from lhcp.training.together import RanksFailed, gather, together
from lhcp.training.training_state import not_finite, restore, tensors_of


@dataclass(frozen=True)
class Sharing:
    """What a run takes from another run's checkpoints, and leaves to others in its own."""

    begin: Path | None = None
    """A checkpoint to begin from where the run's own folder has none."""
    marks: frozenset[int] = frozenset()
    """Steps after which the run is evaluated, and its checkpoint kept for good."""
    weights: Path | None = None
    """A checkpoint of the run's short stage: without another to begin from, its weights and its
    optimiser are what the run has before its first step."""


ALONE = Sharing()
"""Nothing is shared."""


class SaveFailed(RuntimeError):
    """A checkpoint was not written; those before it are as they were."""


class NoCheckpointLeft(RuntimeError):
    """There are checkpoints, and none of them can be taken."""


def require_finite(state: dict[str, Any], step: int, folder: Path) -> None:
    """Check that weights and optimiser are finite on all ranks; every rank calls it.

    Raises:
        FloatingPointError: they are not; the message names the first, and its rank.
    """
    bad = {rank: names for rank, names in enumerate(gather(not_finite(state))) if names}
    if bad:
        rank, names = next(iter(bad.items()))
        raise FloatingPointError(
            f"after step {step} {names[0]} is not finite on rank {rank} ({len(names)} tensors "
            f"there, ranks {list(bad)}): no checkpoint is written; {newest_in(folder)}; resume "
            "from there with a lower --optim.lr or more warm-up"
        )


def newest_in(folder: Path) -> str:
    """Say which checkpoint of a folder is the newest; every rank calls it."""
    there = checkpoints_in(folder)
    return f"{there[0]} stays the newest" if there else f"{folder} has none before it"


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    beside: dict[str, Any],
    keep: int,
    marks: Collection[int] = (),
) -> Path:
    """Write the state after `step` steps and drop all but the last `keep` and marked checkpoints.

    Every rank calls it with the same arguments.

    Args:
        folder: Holds the checkpoints of one run; on storage that all ranks share.
        step: Steps done.
        model: Sharded or whole.
        optimizer: The optimiser of `model`.
        beside: Goes into complete.json and comes back from `read_beside`.
        keep: How many whole ones to keep, at least 1.
        marks: Steps of checkpoints that stay beside those.

    Raises:
        FloatingPointError: a weight or the optimiser's state is not finite, on all ranks alike.
        SaveFailed: a rank could not write or does not see what others wrote, on all ranks alike;
            the checkpoints before this one are as they were.
    """
    final = folder / f"step-{step:08d}"
    state = tensors_of(model, optimizer)
    require_finite(state, step, folder)
    try:
        write(state, final, step, beside)
    except RanksFailed as error:
        full = error.full or disk_is_full(folder)
        if dist.get_rank() == 0:
            shutil.rmtree(final.with_suffix(UNFINISHED), ignore_errors=True)
        why = "the disk is full: " if full else ""
        advice = "make room" if full else "mend that"
        raise SaveFailed(
            f"{final} was not written: {why}{error}. {newest_in(folder).capitalize()}; {advice} "
            "and start the same command again, which goes on from there"
        ) from error
    prune(final, keep, marks)
    return final


def latest(
    folder: Path, begin: Path | None = None, passed: Callable[[str], None] = lambda said: None
) -> Path | None:
    """Return the newest whole checkpoint, or None where there is none at all.

    Every rank calls it and gets the same.

    Args:
        folder: Holds the checkpoints of one run.
        begin: The checkpoint to begin from where `folder` has none.
        passed: Is told which checkpoint is passed over, and why.

    Raises:
        ValueError: `folder` has none, and `begin` is given but not a whole checkpoint.
        NoCheckpointLeft: there are checkpoints, and all of them are damaged.
    """
    return take_newest(folder, begin, passed, lambda path: None)


def take_newest(
    folder: Path,
    begin: Path | None,
    passed: Callable[[str], None],
    take: Callable[[Path], None],
) -> Path | None:
    """Give `take` the newest whole checkpoint, and the one before it where it raises RanksFailed.

    Every rank calls it. Otherwise as `latest`.
    """
    reasons: dict[Path, str] = {}
    own = checkpoints_in(folder)
    for path in own if begin is None else [*own, begin]:
        reasons[path] = trouble_with(path)
        if not reasons[path]:
            try:
                take(path)
                return path
            except RanksFailed as error:
                reasons[path] = str(error)
        passed(f"{path} is passed over: {reasons[path]}")
    said = "; ".join(f"{path}: {reason}" for path, reason in reasons.items())
    if begin is not None:
        raise ValueError(
            f"{begin}: no whole checkpoint, from which the run in {folder} was to begin; train "
            f"the run in {begin.parent} again, in another --out or with that folder removed "
            f"({said})"
        )
    if reasons:
        raise NoCheckpointLeft(
            f"{folder} has checkpoints, and none can be taken ({said}). Mend what is said there, "
            f"put back a copy of one, or remove {folder} to start anew from step 0"
        )
    return None


def read_beside(path: Path) -> tuple[int, dict[str, Any]]:
    """Return the steps done and what `save` got as `beside`.

    Raises:
        DamagedCheckpoint: the record is not as it was written.
    """
    record = Record.read(path)
    return record.step, record.beside


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put the state at `path` into `model` and `optimizer`, on any number of ranks.

    Every rank calls it.

    Returns:
        The steps done.

    Raises:
        UnsafeCheckpointError: the checkpoint asks for code, or holds more than tensors.
        RanksFailed: it cannot be read, or is not finite; on all ranks, and the state is undefined.
    """

    # Checked first and outside of torch's loader, which would wrap the error beyond recognition.
    def unsafe() -> str:
        try:
            TensorReader(path).read_metadata()
        except UnsafeCheckpointError as error:
            return str(error)
        return ""

    for said in together(unsafe):
        if said:
            raise UnsafeCheckpointError(said)
    state = tensors_of(model, optimizer)
    together(lambda: state_dict_loader.load(state, storage_reader=TensorReader(path)))

    def put_back() -> int:
        if bad := not_finite(state):
            raise DamagedCheckpoint(f"{bad[0]} is not finite ({len(bad)} tensors)")
        restore(state, model, optimizer)
        return read_beside(path)[0]

    return together(put_back)[0]
