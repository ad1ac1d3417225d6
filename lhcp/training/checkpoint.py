"""Checkpoints with torch.distributed.checkpoint: atomic, checked, loaded without running code.

A checkpoint is a folder `step-00000100`: what torch wrote, and `complete.json`, the list of its
files with their sizes and whatever the caller keeps beside the tensors. It is written under
another name and renamed when complete, so a folder of that name is whole, or was damaged later:
then the list shows it, and the one before it is taken.
"""

import json
import pickle
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import filesystem, metadata, state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

COMPLETE = "complete.json"
UNFINISHED = ".unfinished"

ALLOWED = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        metadata.Metadata,
        metadata.TensorStorageMetadata,
        metadata.TensorProperties,
        metadata.ChunkStorageMetadata,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
        torch.Size,
    )
} | {
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    # Where the checkpoint was written; only its text is kept.
    ("pathlib", "PosixPath"): lambda *parts: "/".join(parts),
    ("pathlib._local", "PosixPath"): lambda *parts: "/".join(parts),
}


@dataclass(frozen=True)
class Sharing:
    """What a run takes from another run's checkpoints, and leaves to others in its own."""

    begin: Path | None = None
    """A checkpoint to begin from where the run's own folder has none."""
    marks: frozenset[int] = frozenset()
    """Steps after which the run is evaluated, and its checkpoint kept for good."""


ALONE = Sharing()
"""Nothing is shared."""


class UnsafeCheckpointError(RuntimeError):
    """A checkpoint asks for something that its tensors do not need; nothing of it was run."""


class MetadataUnpickler(pickle.Unpickler):
    """Reads torch's checkpoint metadata, a pickle, and refuses every name but its plain records."""

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed class or dtype.

        Raises:
            UnsafeCheckpointError: the pickle names anything else.
        """
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise UnsafeCheckpointError(
            f"checkpoint metadata asks for {module}.{name}, which is not a record of a tensor: "
            "the file was not written by this program; delete the checkpoint"
        )


class TensorReader(filesystem.FileSystemReader):
    """A reader like torch's, for checkpoints that hold tensors alone.

    torch reads the metadata and every non-tensor with plain pickle, which runs what the file says.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """Return the metadata, unpickled with `MetadataUnpickler`.

        Raises:
            UnsafeCheckpointError: the metadata holds something else than tensors in plain files.
        """
        with open(Path(self.path) / ".metadata", "rb") as file:
            found: metadata.Metadata = MetadataUnpickler(file).load()
        entries = found.state_dict_metadata.values()
        if not all(type(entry) is metadata.TensorStorageMetadata for entry in entries):
            raise UnsafeCheckpointError("checkpoint metadata lists an entry that is not a tensor")
        for info in found.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise UnsafeCheckpointError(
                    f"checkpoint metadata points outside its folder: {info.relative_path!r}"
                )
        found.storage_meta = found.storage_meta or metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return all tensors of the training state; the optimiser's numbers come from the run."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    return {
        "model": get_model_state_dict(model),
        "optimizer": {name: value for name, value in state.items() if isinstance(value, Tensor)},
        "rng": torch.get_rng_state(),
    }


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
        keep: How many to keep, at least 1.
        marks: Steps of checkpoints that stay beside those.
    """
    final = folder / f"step-{step:08d}"
    unfinished = final.with_suffix(UNFINISHED)
    if dist.get_rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    writer = filesystem.FileSystemWriter(unfinished)
    state_dict_saver.save(tensors_of(model, optimizer), storage_writer=writer)
    dist.barrier()
    if dist.get_rank() == 0:
        files = {path.name: path.stat().st_size for path in sorted(unfinished.iterdir())}
        text = json.dumps({"step": step, "files": files, "beside": beside})
        (unfinished / COMPLETE).write_text(text)
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        for old in sorted(folder.glob("step-*[0-9]"))[:-keep]:
            if int(old.name.removeprefix("step-")) not in marks:
                shutil.rmtree(old)
    dist.barrier()
    return final


def is_whole(path: Path) -> bool:
    """Tell whether all files of the checkpoint are there with their sizes."""
    try:
        files = json.loads((path / COMPLETE).read_text())["files"]
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def latest(folder: Path, begin: Path | None = None) -> Path | None:
    """Return the newest whole checkpoint, or None; unfinished and damaged ones are passed over.

    Every rank calls it; rank 0 looks and tells the others, so that they cannot disagree.

    Args:
        folder: Holds the checkpoints of one run.
        begin: The checkpoint to begin from where `folder` has none.

    Raises:
        ValueError: `folder` has none, and `begin` is given but not a whole checkpoint.
    """
    found: list[Path | None] = [None]
    if dist.get_rank() == 0:
        own = sorted(folder.glob("step-*[0-9]"), reverse=True)
        there = own if begin is None else [*own, begin]
        found = [next((path for path in there if is_whole(path)), None)]
    dist.broadcast_object_list(found)
    if found[0] is None and begin is not None:
        raise ValueError(
            f"{begin}: no whole checkpoint, from which the run in {folder} was to begin; train "
            f"the run in {begin.parent} again, in another --out or with that folder removed"
        )
    return found[0]


def read_beside(path: Path) -> tuple[int, dict[str, Any]]:
    """Return the steps done and what `save` got as `beside`."""
    record = json.loads((path / COMPLETE).read_text())
    return record["step"], record["beside"]


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put the state at `path` into `model` and `optimizer`, on any number of ranks.

    Returns:
        The steps done.

    Raises:
        UnsafeCheckpointError: the checkpoint asks for code, or holds more than tensors.
    """
    # Checked first and outside of torch's loader, which would wrap the error beyond recognition.
    TensorReader(path).read_metadata()
    state = tensors_of(model, optimizer)
    state_dict_loader.load(state, storage_reader=TensorReader(path))
    set_model_state_dict(model, state["model"])
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    whole = get_optimizer_state_dict(model, optimizer, options=options) | state["optimizer"]
    set_optimizer_state_dict(model, optimizer, whole, options=options)
    torch.set_rng_state(state["rng"])
    return read_beside(path)[0]
