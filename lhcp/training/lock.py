"""One run in a folder at a time: a lock that ends with its process, and says who holds it."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from filelock import FileLock, Timeout

LOCK = "run.lock"
HOLDER = "run.holder.json"


class FolderInUse(RuntimeError):
    """Another run holds the folder."""


@contextmanager
def held(folder: Path) -> Iterator[str]:
    """Hold `folder` for this run; every rank enters and leaves, rank 0 takes the lock.

    The system gives the lock back when the process ends, however it ends: nobody has to clean up.

    Yields:
        What the user should know, or "": on a file system without locks the folder is not held.

    Raises:
        FolderInUse: another run holds it, on all ranks alike; the message says who.
    """
    lock = FileLock(folder / LOCK)
    said: list[tuple[bool, str]] = [(True, "")]
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        said = [take(lock, folder)]
    dist.broadcast_object_list(said)
    taken, message = said[0]
    if not taken:
        raise FolderInUse(message)
    try:
        yield message
    finally:
        if lock.is_locked:
            (folder / HOLDER).unlink(missing_ok=True)
            lock.release()


def take(lock: FileLock, folder: Path) -> tuple[bool, str]:
    """Try to take the lock; return whether this run may go on, and what to say."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False, (
            f"{folder} is in use by another run ({holder(folder)}): wait for it or end it, or "
            "give this run another folder with --out"
        )
    except NotImplementedError:  # of filelock, where the file system has none; its user is told
        return True, f"{folder}: its file system has no locks; see that one run at a time uses it"
    about = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T")}
    (folder / HOLDER).write_text(json.dumps(about))
    return True, ""


def holder(folder: Path) -> str:
    """Say who holds the folder, as far as it wrote that down."""
    try:
        about = json.loads((folder / HOLDER).read_text())
        return f"process {about['pid']} on {about['host']} since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "which has not written down who it is"
