"""Ranks of which one goes astray, in processes of their own: what each of them says, and when.

A pool's ranks could not be used again afterwards. They are forked from a process that has torch.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STALLS = multiprocessing.get_context("forkserver")
STALLS.set_forkserver_preload(["torch.distributed", "lhcp"])


@dataclass(frozen=True)
class Ended:
    """How a rank ended."""

    code: int | None
    """Exit status; less than 0: a signal's; None: it was still there."""
    said: str
    """What it wrote to stderr."""
    seconds: float
    """Until it ended, from when it was told to go astray."""


def run_ranks(
    folder: Path,
    world: int,
    work: Callable[..., None],
    *args: Any,
    patience: float = 30.0,
    by_nccl: bool = False,
) -> list[Ended]:
    """Run work(rank, folder, *args) on each rank of a group; return how they ended.

    Ranks that are there after `patience` seconds, as frozen ones, are killed.

    Args:
        by_nccl: whether each has a GPU, and the group NCCL for it; else gloo alone. Ranks beyond
            the GPUs share them, which NCCL must have been told.
    """
    processes = [
        STALLS.Process(target=_rank, args=(rank, world, folder, work, args, by_nccl))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        deadline = time.monotonic() + patience
        ends: dict[int, float] = {}
        while time.monotonic() < deadline and len(ends) < world:
            for rank, process in enumerate(processes):
                if rank not in ends and process.exitcode is not None:
                    ends[rank] = time.time()
            # A frozen rank is left alone when the others have ended.
            if len(ends) == world - 1 and (folder / "frozen").exists():
                break
            time.sleep(0.02)
    finally:
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
    astray = folder / "astray"
    begin = astray.stat().st_mtime if astray.exists() else 0.0
    return [
        Ended(codes[rank], (folder / f"said{rank}").read_text(), ends.get(rank, 0.0) - begin)
        for rank in range(world)
    ]


def go_astray(folder: Path) -> None:
    """Note the time."""
    (folder / "astray").touch()


def freeze(folder: Path) -> None:
    """Stop this process, as SIGSTOP from outside does."""
    go_astray(folder)
    (folder / "frozen").touch()
    os.kill(os.getpid(), signal.SIGSTOP)


def _rank(
    rank: int,
    world: int,
    folder: Path,
    work: Callable[..., None],
    args: tuple[Any, ...],
    by_nccl: bool,
) -> None:
    import torch
    import torch.distributed as dist

    file = os.open(folder / f"said{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 2)
    sys.stderr = os.fdopen(2, "w")
    torch.set_num_threads(1)
    backend = "gloo"
    if by_nccl:
        torch.cuda.set_device(rank % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, f"file://{folder}/store", rank=rank, world_size=world)
    work(rank, folder, *args)
    sys.stderr.flush()
    # Without the interpreter's end, in which a gloo rank may abort.
    os._exit(0)
