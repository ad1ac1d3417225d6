"""The faults: how each is provoked, what must be said then, and what must survive."""

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.faults.calls import WORLD, astray
from tests.faults.provoke import (
    absent,
    cut_off,
    damaged,
    flip,
    frozen_at_start,
    full,
    in_use,
    no_reader,
    not_shared,
    nowhere,
    of_all,
    orphaned,
    other_text,
    overshot,
    restarted,
    started_apart,
    stopped_alone,
    struck,
    tear,
)
from tests.faults.runs import BY_NCCL, TIMEOUT, Outcome


@dataclass(frozen=True)
class Fault:
    """One row of the table, and one test."""

    name: str
    how: str
    """How it is provoked."""
    provoke: Callable[[Path], Outcome]
    """Provokes it in a folder; run_of(folder) is the run's."""
    says: tuple[str, ...]
    """What must be printed."""
    survives: str
    """In words."""
    goes_on: bool = False
    """Whether the same command must go on from a checkpoint afterwards, to another step."""
    within: float = 20.0
    """Seconds from the fault to the end; a failing start counts from the start of the processes."""
    fails: bool = True
    """Whether ranks must end with another status than 0."""
    world: int = 2
    """Ranks that send messages; 1: it makes no difference how they would."""
    shown: str = ""
    """Text with which the line begins that the table shows; empty: the first that must be said."""


NOTED = "" if BY_NCCL else "RanksLost: "
"""Gloo's messages to a rank that is gone fail at once; NCCL's wait, until the watchdog ends it."""
LOST = "rank 1 was last heard in step "
KEPT = "the newest whole checkpoint, from which the same command goes on"

FAULTS = [
    Fault(
        "a rank is killed",
        "SIGKILL to rank 1 of 2",
        struck(signal.SIGKILL),
        (NOTED, LOST, "rank 0 waits in step "),
        KEPT,
        goes_on=True,
        shown=LOST,
    ),
    Fault(
        "a rank is frozen",
        f"SIGSTOP to rank 1 of 2, --timeout {TIMEOUT:g}",
        struck(signal.SIGSTOP),
        ("rank 0 of 2 ends, after ", LOST, "its main thread: "),
        KEPT,
        goes_on=True,
    ),
    Fault(
        "rank 0, which keeps the store, is frozen",
        f"SIGSTOP to rank 0 of 2, --timeout {TIMEOUT:g}",
        struck(signal.SIGSTOP, rank=0),
        ("rank 1 of 2 ends: the store through which ranks find one another is gone",),
        KEPT,
        goes_on=True,
    ),
    Fault(
        "a rank of four is killed",
        "SIGKILL to rank 2 of 4 (dp 2 x cp 2)",
        struck(signal.SIGKILL, rank=2, world=4),
        (NOTED, "rank 2 was last heard in step "),
        KEPT,
        goes_on=True,
        world=4,
        shown="rank 2 was last heard in step ",
    ),
    Fault(
        "a rank of four is frozen",
        f"SIGSTOP to rank 2 of 4 (dp 2 x cp 2), --timeout {TIMEOUT:g}",
        struck(signal.SIGSTOP, rank=2, world=4),
        ("rank 0 of 4 ends, after ", "rank 2 was last heard in step ", "its main thread: "),
        KEPT,
        goes_on=True,
        world=4,
    ),
    Fault(
        "a cable is pulled",
        f"of the node of rank 1 (a network namespace each), for good, --timeout {TIMEOUT:g}",
        cut_off,
        (LOST, "rank 1 of 2 ends: the store through which ranks find one another is gone"),
        KEPT,
        goes_on=True,
    ),
    Fault(
        "a rank is killed, torchrun restarts",
        "SIGKILL to rank 1 of 2 under torchrun --max-restarts 1",
        restarted(signal.SIGKILL),
        (LOST, "going on after step"),
        "the run, to the same bits",
        fails=False,
        within=40.0,
        shown="going on after step",
    ),
    Fault(
        "a rank is frozen, torchrun restarts",
        f"SIGSTOP to rank 1 of 2 under torchrun --max-restarts 1, --timeout {TIMEOUT:g}",
        restarted(signal.SIGSTOP),
        ("rank 0 of 2 ends, after ", "going on after step"),
        "the run; torchrun gives the frozen rank 30 s before it kills it",
        fails=False,
        within=70.0,
    ),
    Fault(
        "torchrun's agent is killed",
        "SIGKILL to torchrun",
        orphaned,
        ("the store through which ranks find one another is gone",),
        KEPT + "; no orphan trains on",
        goes_on=True,
        within=30.0,
    ),
    Fault(
        "a rank does not come",
        "1 of 2 ranks started, --timeout 1",
        absent,
        ("1 of 2 joined, rank 1 missing after 5 s",),
        "nothing was begun",
    ),
    Fault(
        "a rank is frozen as ranks connect",
        "SIGSTOP to rank 1 of 2 when all have come, --timeout 3",
        frozen_at_start,
        # Where it is caught, connecting or just after, is the machine's.
        ("rank 0 of 2 ends, after ", "rank 1 ", "rank 0 waits in "),
        "nothing was begun",
        within=40.0,
    ),
    Fault(
        "ranks without a place to meet",
        "WORLD_SIZE=2, no MASTER_ADDR",
        nowhere,
        ("WORLD_SIZE=2 without MASTER_ADDR",),
        "nothing was begun",
        world=1,
    ),
    *(
        Fault(
            f"a rank has another {name}",
            f"rank 1 of 2 started with {' '.join(words)}",
            started_apart(*words),
            (said,),
            "nothing was begun",
            within=30.0,
        )
        for name, words, said in (
            ("seed", ("--seed", "1"), "seed: 0 on rank 0, 1 on rank 1"),
            ("rate", ("--optim.lr", "0.5"), "optim.lr: "),
            ("rhythm of evaluations", ("--eval-every", "7"), "eval_every: 100 on rank 0, 7 on"),
        )
    ),
    Fault(
        "a rank reads another text",
        "rank 1 of 2 sees other contents in a file of the same name",
        other_text,
        ("ranks were asked for different things: ", "data"),
        "nothing was begun",
        within=30.0,
    ),
    Fault(
        "SIGTERM",
        "to rank 1 of 2",
        struck(signal.SIGTERM),
        ("stopped by SIGTERM after step",),
        "every step that was done",
        goes_on=True,
    ),
    Fault(
        "Slurm's warning",
        "SIGUSR1 to rank 1 of 2",
        struck(signal.SIGUSR1),
        ("stopped by SIGUSR1 after step",),
        "every step that was done",
        goes_on=True,
    ),
    Fault(
        "Ctrl-C",
        "SIGINT to a run of one rank",
        stopped_alone(signal.SIGINT),
        ("interrupted: checkpoints are as they were",),
        KEPT,
        goes_on=True,
        world=1,
    ),
    Fault(
        "the reader of the output goes",
        "standard output is a pipe that is closed",
        no_reader,
        ("step 48 reached: True",),
        "the run: it trains on",
        goes_on=True,
        world=1,
    ),
    Fault(
        "two runs in one folder",
        "a second run with the same --out",
        in_use,
        ("is in use by another run (process ",),
        "the first run",
        world=1,
    ),
    Fault(
        "a byte of the newest checkpoint is turned",
        "at equal size, then the same command",
        damaged(lambda paths: flip(paths[0])),
        ("is passed over: ", "going on after step"),
        "the checkpoint before it",
        fails=False,
        shown="is passed over: ",
        world=1,
    ),
    Fault(
        "the newest checkpoint is torn",
        "its file cut in half, then the same command",
        damaged(lambda paths: tear(paths[0])),
        ("is passed over: ", "going on after step"),
        "the checkpoint before it",
        fails=False,
        world=1,
    ),
    Fault(
        "all checkpoints are torn",
        "their files cut in half, then the same command",
        damaged(of_all(tear)),
        ("has checkpoints, and none can be taken",),
        "the files, as they are: it does not start from step 0",
        world=1,
    ),
    Fault(
        "the disk is full",
        "a disk of 3.5 MB (tmpfs in a namespace), where the second checkpoint does not fit",
        full,
        ("was not written: the disk is full: ", "stays the newest"),
        "the checkpoint before it",
        within=30.0,
    ),
    Fault(
        "a folder that not all ranks share",
        "rank 1 of 2 has, in a namespace, another disk in the place of --out",
        not_shared,
        ("is not one folder for all ranks: ranks [1] of 2 and rank 0 do not see",),
        "nothing was begun",
        within=30.0,
    ),
    Fault(
        "weights that are not finite",
        "a learning rate of 1e38, a checkpoint each step",
        overshot,
        ("not finite",),
        "checkpoints before it; none with NaN is written",
        within=30.0,
        shown="FloatingPointError: ",
    ),
    *(
        Fault(
            name,
            f"rank 1 of {WORLD}, at step 6: {how}",
            astray(fault),
            says,
            "the process is ended",
            world=WORLD,
        )
        for name, fault, how, says in (
            (
                "an error in a backward",
                "backward",
                "a ValueError in a hook",
                ("rank 1 ended in step 6, backward: ValueError: only here", NOTED),
            ),
            (
                "a call of another length",
                "length",
                "q, k and v twice as long, the others a call that they know",
                ("the ranks' attention calls differ: ", "rank 1 is at attention call 3 ("),
            ),
            (
                "a call of another config",
                "config",
                "another topk, the others a call that they know",
                ("the ranks' attention calls differ: ", "config.topk: "),
            ),
            (
                "other documents",
                "documents",
                "shorter ones than the others, at a call that all ranks know",
                (
                    "the ranks' attention calls differ: ",
                    f"(cu_seqlens: {2 * WORLD} documents of digest ",
                ),
            ),
            (
                "a gradient that others do not want",
                "gradient",
                "inputs without a gradient, in a call that is new to all",
                ("a gradient: wanted on rank 0, not wanted on rank 1",),
            ),
            (
                "another known call",
                "known call",
                "another scale, which all ranks know",
                ("rank 1 is at attention call 3 (scale: 0.3)",),
            ),
            (
                "a call too many",
                "extra call",
                "it attends twice",
                ("rank 1 is at attention call 4",),
            ),
            (
                "a rank hangs and lives",
                "hang",
                "it sleeps",
                ("rank 1 is alive and has not moved from step 6, forward for ",),
            ),
        )
    ),
]
"""In the order of the table."""


def silent(fault: Fault, outcome: Outcome) -> str:
    """Return what is wrong with how a fault ended; "" where it is as it must be."""
    wrong = [f"{text!r} was not said" for text in fault.says if text not in outcome.text]
    if fault.fails and any(code == 0 for code in outcome.codes):
        wrong.append(f"exit status {outcome.codes}")
    if outcome.seconds > (most := fault.within + 2 * TIMEOUT):
        wrong.append(f"it took {outcome.seconds:.0f} s, may take {most:.0f}")
    return "; ".join(wrong)
