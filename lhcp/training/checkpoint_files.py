"""The files of a checkpoint: their digests, whether they are whole, and which may be dropped.

`complete.json` lists every file with its size and digest, and has a digest of its own. Each rank
digests the files that it wrote, right after it wrote them: it alone knows what they should hold,
on shared storage its own are those that it still has in memory, and all ranks read at once. What is
read back later, to resume or before older ones are dropped, is divided over the ranks.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import torch.distributed as dist

from lhcp.training.digests import digest_of, is_as_written
from lhcp.training.together import NO_SPACE, gather, together

COMPLETE = "complete.json"
UNFINISHED = ".unfinished"
NAME = re.compile(r"step-(\d{8,})")

Files = dict[str, tuple[int, str]]
"""Name -> size and digest; "" where a checkpoint of an older version has none."""


class DamagedCheckpoint(ValueError):
    """A file of a checkpoint is not there, or is not as it was written."""


@dataclass(frozen=True)
class Record:
    """What complete.json says."""

    step: int
    files: Files
    beside: dict[str, Any]

    def to_text(self) -> str:
        """Return the file's text, which ends with the digest of the rest."""
        body = json.dumps({"step": self.step, "files": self.files, "beside": self.beside})
        return json.dumps(json.loads(body) | {"sha256": text_digest(body)})

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Read the record of the checkpoint at `path`.

        Raises:
            DamagedCheckpoint: it is not there or not as it was written.
        """
        try:
            found = json.loads((path / COMPLETE).read_text())
            said = found.pop("sha256", None)
            files = {
                name: (about, "") if isinstance(about, int) else (int(about[0]), str(about[1]))
                for name, about in found["files"].items()
            }
            if said is not None and text_digest(json.dumps(found)) != said:
                raise DamagedCheckpoint(f"{COMPLETE} is not as it was written: its digest differs")
            if any(Path(name).name != name for name in files):
                raise DamagedCheckpoint(f"{COMPLETE} names files outside its folder")
            return cls(int(found["step"]), files, found["beside"])
        except FileNotFoundError as error:
            raise DamagedCheckpoint(f"{COMPLETE} is not there") from error
        except OSError as error:
            raise DamagedCheckpoint(f"{COMPLETE} cannot be read: {error}") from error
        except (KeyError, TypeError, AttributeError, LookupError, UnicodeDecodeError) as error:
            raise DamagedCheckpoint(f"{COMPLETE} is not as it was written") from error
        except json.JSONDecodeError as error:
            raise DamagedCheckpoint(f"{COMPLETE} is torn: {error}") from error


def text_digest(text: str) -> str:
    """Return SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def describe(folder: Path, names: Iterable[str]) -> Files:
    """Return the size and the digest of each file."""
    paths = [folder / name for name in sorted(names)]
    return {path.name: (path.stat().st_size, digest_of(path)) for path in paths}


def disk_is_full(folder: Path) -> bool:
    """Tell whether some rank can write no megabyte there any more; every rank calls it.

    Asked after a failure, before what was written goes: torch's writer of tensors may say that a
    position is not as it expected, and no more.
    """

    def full() -> bool:
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(1 << 20))
                file.flush()
        except OSError as error:
            return error.errno in NO_SPACE
        return False

    return any(gather(full()))


def own_trouble(path: Path, rank: int, world_size: int) -> str:
    """Say what this rank finds wrong with a checkpoint, or "".

    It looks at the size of every file, and reads its share of them whole: all ranks together read
    each file once, and each rank has seen that it can reach them all.
    """
    try:
        files = Record.read(path).files
        for index, (name, (size, digest)) in enumerate(files.items()):
            there = (path / name).stat().st_size
            if there != size:
                return f"{name} has {there} bytes of {size}"
            mine = index % world_size == rank and digest
            if mine and not is_as_written(path / name, digest):
                return f"{name} is not as it was written: its digest differs"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is not there"
    except (OSError, DamagedCheckpoint) as error:
        return str(error)
    return ""


def trouble_with(path: Path) -> str:
    """Say what is wrong with a checkpoint, or ""; every rank calls it, and gets the same."""
    found = gather(own_trouble(path, dist.get_rank(), dist.get_world_size()))
    said: dict[str, list[int]] = {}
    for rank, text in enumerate(found):
        if text:
            said.setdefault(text, []).append(rank)
    alike = len(said) == 1 and all(found)
    return "; ".join(t if alike else f"{t} (seen by rank {ranks})" for t, ranks in said.items())


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder as rank 0 sees them, newest first; every rank calls it.

    Folders of any other name are nobody's business, and neither counted nor touched.
    """
    found: list[list[Path]] = [[]]
    if dist.get_rank() == 0 and folder.is_dir():
        named = [p for p in folder.iterdir() if NAME.fullmatch(p.name) and p.is_dir()]
        found = [sorted(named, key=step_of, reverse=True)]
    dist.broadcast_object_list(found)
    return found[0]


def step_of(path: Path) -> int:
    """Return the steps done of a checkpoint, by its name."""
    return int(path.name.removeprefix("step-"))


def wait_until_seen(folder: Path, files: Files, patience: float = 20.0) -> None:
    """Wait until this rank sees all files with their sizes; network storage may take a moment.

    Raises:
        FileNotFoundError: it does not see one within `patience` seconds.
    """
    deadline = monotonic() + patience
    for name, (size, _) in files.items():
        while not ((folder / name).exists() and (folder / name).stat().st_size == size):
            if monotonic() > deadline:
                raise FileNotFoundError(
                    f"{folder / name}, which another rank wrote, is not seen here: --out must be "
                    "on storage that all ranks share"
                )
            sleep(0.1)


def publish(unfinished: Path, final: Path, record: Record) -> None:
    """Write the record and give the checkpoint its name, so that it is on the disk before that."""
    with open(unfinished / COMPLETE, "w") as file:
        file.write(record.to_text())
        file.flush()
        os.fsync(file.fileno())
    sync_folder(unfinished)
    if final.exists():
        shutil.rmtree(final)
    unfinished.rename(final)
    sync_folder(final.parent)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, where its file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def prune(
    newest: Path,
    keep: int,
    marks: Collection[int],
    trouble: Callable[[Path], str] = trouble_with,
) -> None:
    """Drop what is older than the last `keep` whole checkpoints, but those of `marks`.

    Every rank calls it. `newest`, just written, is one of the `keep`; the others are read back
    before anything that they stand for is dropped. Newer ones were passed over at the start: they
    do not count, and stay until the run writes them anew.
    """
    older = [p for p in checkpoints_in(newest.parent) if step_of(p) < step_of(newest)]
    left = keep - 1
    while older and left:
        if len(older) <= left:
            return
        left -= not trouble(older.pop(0))
    drop = [path for path in older if step_of(path) not in marks]

    def remove() -> None:
        if dist.get_rank() == 0:
            # Without a record it is not ours to remove.
            for path in drop:
                if (path / COMPLETE).exists():
                    shutil.rmtree(path)

    together(remove)
