"""Joining and leaving the process group, under torchrun or as one plain process."""

import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lhcp.console import escape_unprintable


@dataclass(frozen=True)
class Process:
    """This process among those of the run, and its device."""

    rank: int
    world_size: int
    device: torch.device


def join() -> Process:
    """Join the ranks that torchrun started (a plain process is one rank) and pick the device.

    Ranks with a GPU each use NCCL, all others gloo on the CPU.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    if (
        torch.cuda.is_available()
        and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= torch.cuda.device_count()
    ):
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)
    else:
        # Public in torch, but its type hints do not say so.
        names: Any = dist
        dist.init_process_group(backend, store=names.HashStore(), rank=rank, world_size=world_size)
    return Process(rank, world_size, device)


def leave(code: int) -> None:
    """End this process with exit status `code`; does not return.

    On success all ranks wait for one another first; after an error this rank goes at once, and
    the launcher ends the others.
    """
    if code == 0:
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # A gloo rank that is done and has destroyed its group now and then still aborts while the
    # interpreter takes down its threads ("terminate called without an active exception"), and
    # torchrun then reports a failed run. Leaving here skips that teardown.
    os._exit(code)


def run_to_exit(main: Callable[[Process], None]) -> None:
    """Join, call `main`, leave; an error prints its rank and ends with status 1."""
    escape_unprintable()
    rank = os.environ.get("RANK", "0")
    try:
        main(join())
    except BaseException as error:
        traceback.print_exc()
        print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr)
        leave(1)
    leave(0)
