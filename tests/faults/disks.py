"""Disks of a given size, each in a namespace of mounts: from outside its folder is as it was.

No rights are needed where users may make namespaces. A disk goes with the process that holds it.
"""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Disk:
    """A disk as processes in its namespace have it."""

    place: Path
    """Where it is mounted."""
    inside: tuple[str, ...]
    """Words before a command that is to see it."""
    seen: Path
    """The same place for processes outside."""


@contextmanager
def small_disk(place: Path, kilobytes: int) -> Iterator[Disk]:
    """Mount a disk (tmpfs) at a folder.

    Raises:
        PermissionError: namespaces or mounts are not allowed here.
    """
    place.mkdir(parents=True)
    if not all(map(shutil.which, ("unshare", "nsenter", "mount"))):
        raise PermissionError("a small disk needs unshare, nsenter and mount (util-linux)")
    hold = 'mount -t tmpfs -o "size=$1k" tmpfs "$2" && echo mounted && exec sleep 3600'
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", hold, "sh"]
    words += [str(kilobytes), str(place)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as holder:
        try:
            assert holder.stdout is not None
            if holder.stdout.readline() != b"mounted\n":
                raise PermissionError("mounting a small disk in a namespace is not allowed here")
            enter = ["nsenter", "--preserve-credentials", "--user", "--mount"]
            inside = (*enter, f"--target={holder.pid}", "--")
            yield Disk(place, inside, Path(f"/proc/{holder.pid}/root{place.absolute()}"))
        finally:
            holder.kill()
