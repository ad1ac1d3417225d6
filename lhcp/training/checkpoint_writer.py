"""Writing of a checkpoint under another name; it has its own once every rank has seen all of it."""

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import filesystem, state_dict_saver
from torch.futures import Future

from lhcp.training.checkpoint_files import (
    UNFINISHED,
    Files,
    Record,
    describe,
    publish,
    sync_folder,
    wait_until_seen,
)
from lhcp.training.checkpoint_reader import TensorReader
from lhcp.training.together import together


class NamingWriter(filesystem.FileSystemWriter):
    """A writer like torch's that remembers which files it wrote."""

    written: frozenset[str] = frozenset()

    def write_data(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """Write this rank's tensors."""
        done = super().write_data(*args, **kwargs)
        self.written = frozenset(one.storage_data.relative_path for one in done.wait())
        return done


def write(state: dict[str, Any], final: Path, step: int, beside: dict[str, Any]) -> None:
    """Write a checkpoint; it has its name when every rank has seen all of it.

    Raises:
        RanksFailed: a rank could not write, or does not see a file.
    """
    first, unfinished = dist.get_rank() == 0, final.with_suffix(UNFINISHED)

    def make_folder() -> None:
        if first:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)

    together(make_folder)
    writer = NamingWriter(unfinished)
    together(lambda: state_dict_saver.save(state, storage_writer=writer))

    def describe_own() -> Files:
        sync_folder(unfinished)
        return describe(unfinished, {*writer.written, *([".metadata"] if first else [])})

    files = {name: about for own in together(describe_own) for name, about in own.items()}

    def look() -> None:
        wait_until_seen(unfinished, files)
        found = TensorReader(unfinished).read_metadata()
        missing = {info.relative_path for info in found.storage_data.values()} - files.keys()
        if missing:
            raise FileNotFoundError(f"{sorted(missing)}, which the metadata names, nobody wrote")

    together(look)
    together(lambda: publish(unfinished, final, Record(step, files, beside)) if first else None)
