"""Joining and leaving the process group, under torchrun or as one plain process."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler, record

from lhcp.comm.marks import Marks
from lhcp.comm.posts import Members
from lhcp.comm.watchdog import RanksLost, Watchdog, end_process
from lhcp.console import keep_printing
from lhcp.training.debugging import record_messages, serve_messages, write_messages
from lhcp.training.meeting import meet, stay_on_this_machine
from lhcp.training.run import SLOW, START, TIMEOUT
from lhcp.training.stopping import SIGNALS, Stopped, StoppedCompiling
from lhcp.training.together import causes


@dataclass(frozen=True)
class Process:
    """This process among those of the run, and its device."""

    rank: int
    world_size: int
    device: torch.device
    marks: Marks = field(default_factory=Marks)
    """Where it is, for the other ranks' watchdogs."""


def join(timeout: float = START * TIMEOUT) -> Process:
    """Join the ranks that torchrun started (a plain process is one rank) and pick the device.

    Ranks with a GPU each use NCCL, all others gloo on the CPU.

    Args:
        timeout: Seconds to wait for the other ranks to join, and later in a message of all ranks;
            groups of some ranks have torch's own.

    Raises:
        ValueError: WORLD_SIZE says that there are others, and nothing says where; or the timeout
            is none.
        RanksMissing: others did not come within the timeout; the message names them.

    A rank that came and does not connect within the timeout is named too, and the process ends with
    status 124.
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
    if not missing:
        stay_on_this_machine()
    # Public in torch, but its type hints do not say so.
    names: Any = dist
    store = names.HashStore() if missing else meet(rank, world_size, timeout)
    # Gloo itself waits five times the timeout for a connection.
    with Watchdog(Members(store, rank, world_size), timeout) as watchdog:
        watchdog.at("connecting")
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
            device_id=device if device.type == "cuda" else None,
        )
    return Process(rank, world_size, device)


def leave(code: int, *, at_once: bool = False) -> None:
    """End this process with exit status `code`; does not return.

    After an error, or where asked to, this rank goes at once, and the launcher ends the others.
    """
    if not at_once and code in (0, *(128 + number for number in SIGNALS)):
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # A gloo rank that is done and has destroyed its group now and then still aborts while the
    # interpreter takes down its threads ("terminate called without an active exception"), and
    # torchrun then reports a failed run. Leaving here skips that teardown.
    os._exit(code)


@record
def watched(
    main: Callable[[Process], None], own: Process, timeout: float, debug: Path | None
) -> int:
    """Call `main` with a watchdog until all ranks are done; return the exit status.

    What is raised, and what the watchdog says, is in torchrun's summary too.
    """

    def give_up(said: str) -> None:
        if debug is not None and (path := write_messages(debug, own.rank)):
            said = f"{said}; its last messages are in {path}"
        try:
            raise RanksLost(said)
        except RanksLost as lost:
            get_error_handler().record_exception(lost)
        end_process(said)

    with Watchdog(timeout=timeout, on_stall=give_up) as watchdog:
        code = 0
        try:
            main(replace(own, marks=watchdog))
        except Stopped as stop:
            code = stop.code
            if own.rank == 0:
                print(f"\n{stop}", file=sys.stderr)
        except StoppedCompiling as stop:
            print(f"\nrank {own.rank}: {stop}", file=sys.stderr)
            # Others may be in the middle of a message: at once, as after an error.
            leave(stop.code, at_once=True)
        except RuntimeError:
            # The launcher ends this rank as soon as it sees another's death; first it says whose.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise
        watchdog.at("end", patience=SLOW)
        dist.barrier()
    return code


def run_to_exit(
    main: Callable[[Process], None], timeout: float = TIMEOUT, debug: Path | None = None
) -> None:
    """Join, call `main`, leave.

    Exit status: 0; 1 after an error, which is printed with its rank; 143 or 138 after SIGTERM or
    SIGUSR1, when the run has saved, or cannot, since the signal ended a compiler too; 130 after
    Ctrl-C, at once; 124 where ranks waited in vain.

    Args:
        timeout: Seconds that ranks wait for one another at a mark; they have `START` times that to
            come, and as long for any message.
        debug: Torch records and serves what ranks do, and writes it there when they wait in vain.
    """
    keep_printing()
    rank = os.environ.get("RANK", "0")
    code = 0
    try:
        if debug is not None:
            record_messages()
        own = join(START * timeout)
        if debug is not None:
            said = serve_messages()
            if own.rank == 0:
                print(said, flush=True)
        # None is of SystemExit alone, which nothing here raises.
        code = watched(main, own, timeout, debug) or 0
    except BaseException as error:
        # Where it comes in the middle of somebody's C, or of a save, it is another error's cause.
        if any(isinstance(one, KeyboardInterrupt) for one in causes(error)):
            if rank == "0":
                print("\ninterrupted: checkpoints are as they were", file=sys.stderr)
            leave(130)
        traceback.print_exc()
        print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr)
        leave(1)
    leave(code)
