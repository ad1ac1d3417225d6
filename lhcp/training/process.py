"""Joining and leaving the process group, under torchrun or as one plain process."""

import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lhcp.console import keep_printing
from lhcp.training.meeting import meet
from lhcp.training.stopping import SIGNALS, Stopped


@dataclass(frozen=True)
class Process:
    """This process among those of the run, and its device."""

    rank: int
    world_size: int
    device: torch.device


TIMEOUT = 600.0
"""Seconds that ranks wait for one another, to start and in a message of all of them."""


def join(timeout: float = TIMEOUT) -> Process:
    """Join the ranks that torchrun started (a plain process is one rank) and pick the device.

    Ranks with a GPU each use NCCL, all others gloo on the CPU.

    Args:
        timeout: Seconds to wait for the other ranks to join, and later in a message of all ranks;
            groups of some ranks have torch's own.

    Raises:
        ValueError: WORLD_SIZE says that there are others, and nothing says where; or the timeout
            is none.
        RanksMissing: others did not come within the timeout; the message names them.
    """
    if not 0 < timeout < float("inf"):
        raise ValueError(f"timeout={timeout}: must be a positive number of seconds, as 600")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if world_size > 1 and missing:
        raise ValueError(
            f"WORLD_SIZE={world_size} without {' and '.join(missing)}: several ranks need the "
            "place where rank 0 meets them; start them with torchrun, or unset WORLD_SIZE for a "
            "run of one"
        )
    if (
        torch.cuda.is_available()
        and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= torch.cuda.device_count()
    ):
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
    # Public in torch, but its type hints do not say so.
    names: Any = dist
    store = names.HashStore() if missing else meet(rank, world_size, timeout)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
        device_id=device if device.type == "cuda" else None,
    )
    return Process(rank, world_size, device)


def leave(code: int) -> None:
    """End this process with exit status `code`; does not return.

    On success all ranks wait for one another first, as when they were stopped together; after an
    error this rank goes at once, and the launcher ends the others.
    """
    if code in (0, *(128 + number for number in SIGNALS)):
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # A gloo rank that is done and has destroyed its group now and then still aborts while the
    # interpreter takes down its threads ("terminate called without an active exception"), and
    # torchrun then reports a failed run. Leaving here skips that teardown.
    os._exit(code)


def run_to_exit(main: Callable[[Process], None], timeout: float = TIMEOUT) -> None:
    """Join, call `main`, leave.

    Exit status: 0; 1 after an error, which is printed with its rank; 143 or 138 after SIGTERM or
    SIGUSR1, when the run has saved; 130 after Ctrl-C, at once.
    """
    keep_printing()
    rank = os.environ.get("RANK", "0")
    try:
        main(join(timeout))
    except Stopped as stop:
        if rank == "0":
            print(f"\n{stop}", file=sys.stderr)
        leave(stop.code)
    except KeyboardInterrupt:
        if rank == "0":
            print("\ninterrupted: checkpoints are as they were", file=sys.stderr)
        leave(130)
    except BaseException as error:
        traceback.print_exc()
        print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr)
        leave(1)
    leave(0)
