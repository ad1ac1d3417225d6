"""The faults: how each is provoked, what must be said then, and what must survive."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.faults.calls import astray
from tests.faults.runs import RUN, TIMEOUT, Outcome, alive, children, start, torchrun

TWO = ["tiny", "--cp", "2", *RUN]
ONE = ["tiny", *RUN]


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
    shown: str = ""
    """Text with which the line begins that the table shows; empty: the first that must be said."""


def run_of(folder: Path) -> Path:
    """Return the run's folder."""
    return folder / "run"


def two(folder: Path, *more: str) -> list[str]:
    """Return the arguments of one of two ranks."""
    return [*TWO, "--out", str(run_of(folder)), *more]


def one(folder: Path, *more: str) -> list[str]:
    """Return the arguments of a run of one rank."""
    return [*ONE, "--out", str(run_of(folder)), *more]


def struck(number: int, rank: int = 1) -> Callable[[Path], Outcome]:
    """Send a signal to one of two ranks in their steps."""

    def provoke(folder: Path) -> Outcome:
        ranks = start(folder, [two(folder)] * 2)
        ranks.wait_for("30/800  loss")
        ranks.strike(rank, number)
        return ranks.end()

    return provoke


def started_apart(*more: str) -> Callable[[Path], Outcome]:
    """Start the second of two ranks with other arguments."""
    return lambda folder: start(folder, [two(folder), two(folder, *more)]).end()


def other_text(folder: Path) -> Outcome:
    """Start two ranks that see files of one name and other contents."""
    text = Path(__file__).read_bytes() * 40
    for rank in range(2):
        (folder / f"text{rank}").mkdir()
        (folder / f"text{rank}" / "a.txt").write_bytes(text[rank:])
    given = [two(folder, "--data.text", str(folder / f"text{rank}" / "*.txt")) for rank in range(2)]
    return start(folder, given).end()


def stopped_alone(number: int) -> Callable[[Path], Outcome]:
    """Send a signal to a run of one rank."""

    def provoke(folder: Path) -> Outcome:
        ranks = start(folder, [one(folder)])
        ranks.wait_for("30/800  loss")
        ranks.strike(0, number)
        return ranks.end()

    return provoke


def absent(folder: Path) -> Outcome:
    """Start one of two ranks."""
    ranks = start(folder, [two(folder, "--timeout", "1")] * 2)
    ranks.strike(1, signal.SIGKILL)
    return ranks.end()


def nowhere(folder: Path) -> Outcome:
    """Start a rank that is told of another, and not where."""
    return start(folder, [one(folder)], WORLD_SIZE="2", MASTER_ADDR="").end()


def orphaned(folder: Path) -> Outcome:
    """Kill torchrun's agent, and see its ranks end."""
    agent = torchrun(folder, 2, two(folder), restarts=0)
    agent.wait_for("30/800  loss")
    ranks = children(agent.processes[0].pid)
    agent.strike(0, signal.SIGKILL)
    agent.processes[0].wait()
    deadline = time.monotonic() + 40
    while alive(ranks) and time.monotonic() < deadline:
        time.sleep(0.1)
    seconds = time.monotonic() - agent.struck
    left = alive(ranks)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    outcome = agent.end()
    return Outcome([None if left else 1], outcome.said, seconds)


def restarted(number: int) -> Callable[[Path], Outcome]:
    """Strike a rank under torchrun, which starts all of them again, and stop the run then."""

    def provoke(folder: Path) -> Outcome:
        agent = torchrun(folder, 2, two(folder), restarts=1)
        agent.wait_for("30/800  loss")
        agent.struck = time.monotonic()
        os.kill(children(agent.processes[0].pid)[1], number)
        agent.wait_for("going on after step", patience=120)
        seconds = time.monotonic() - agent.struck
        agent.wait_for("80/800  loss")
        agent.processes[0].send_signal(signal.SIGTERM)
        outcome = agent.end()
        return Outcome(outcome.codes, outcome.said, seconds)

    return provoke


def in_use(folder: Path) -> Outcome:
    """Start a run in the folder of another."""
    first = start(folder, [one(folder)])
    first.wait_for("10/800  loss")
    outcome = start(folder, [one(folder)]).end()
    first.kill()
    return outcome


def stopped_run(folder: Path) -> None:
    """Leave a run that was stopped, with two checkpoints at least."""
    ranks = start(folder, [one(folder)])
    ranks.wait_for("30/800  loss")
    ranks.strike(0, signal.SIGTERM)
    assert ranks.end().codes == [143]


def damaged(spoil: Callable[[list[Path]], None]) -> Callable[[Path], Outcome]:
    """Spoil checkpoints of a stopped run, newest first, and go on, until it is stopped again."""

    def provoke(folder: Path) -> Outcome:
        stopped_run(folder)
        spoil(sorted((run_of(folder) / "two_stages").glob("step-*"), reverse=True))
        ranks = start(folder, [one(folder)])
        ranks.struck = time.monotonic()
        try:
            ranks.wait_for("40/800  loss")
        except AssertionError:
            return ranks.end()
        ranks.processes[0].send_signal(signal.SIGTERM)
        return ranks.end()

    return provoke


def flip(path: Path) -> None:
    """Turn the bits of one byte of the tensors; the size stays."""
    data = next(path.glob("*.distcp"))
    written = bytearray(data.read_bytes())
    written[len(written) // 2] ^= 255
    data.write_bytes(written)


def tear(path: Path) -> None:
    """Cut the tensors' file in half, as a crash of a machine may."""
    data = next(path.glob("*.distcp"))
    os.truncate(data, data.stat().st_size // 2)


def of_all(spoil: Callable[[Path], None]) -> Callable[[list[Path]], None]:
    """Spoil every checkpoint."""

    def do(paths: list[Path]) -> None:
        for path in paths:
            spoil(path)

    return do


@contextmanager
def small_disk(place: Path, kilobytes: int) -> Iterator[Path]:
    """Mount a small disk; needs to be allowed to.

    Raises:
        PermissionError: it is not.
    """
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        raise PermissionError("mounting a small disk is not allowed here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def full(folder: Path) -> Outcome:
    """Train where the second checkpoint does not fit."""
    with small_disk(folder / "disk", 3500) as disk:
        given = [*TWO, "--out", str(disk / "run"), "--keep-checkpoints", "2"]
        outcome = start(folder, [given] * 2).end()
        if (disk / "run").exists():
            shutil.copytree(disk / "run", run_of(folder))
    return outcome


def overshot(folder: Path) -> Outcome:
    """Take a step that is far too large."""
    huge = ("--optim.kind", "sgd", "--optim.lr", "1e38", "--optim.warmup-steps", "10")
    ranks = start(folder, [two(folder, *huge, "--checkpoint-every", "1")] * 2)
    ranks.wait_for("1/800  loss")
    ranks.struck = time.monotonic()
    return ranks.end()


def no_reader(folder: Path) -> Outcome:
    """Close the pipe that a run prints to, and see it train on."""
    ranks = start(folder, [one(folder)], program="tests/faults/no_reader.py")
    newest = run_of(folder) / "two_stages" / "step-00000048"
    deadline = time.monotonic() + 60
    while not newest.exists() and time.monotonic() < deadline and ranks.processes[0].poll() is None:
        time.sleep(0.05)
    reached = newest.exists()
    ranks.strike(0, signal.SIGTERM)
    ended = ranks.end()
    return Outcome(ended.codes, [*ended.said, f"step 48 reached: {reached}"], ended.seconds)


LOST = "rank 1 was last heard in step "
KEPT = "the newest whole checkpoint, from which the same command goes on"

FAULTS = [
    Fault(
        "a rank is killed",
        "SIGKILL to rank 1 of 2",
        struck(signal.SIGKILL),
        ("RanksLost: ", LOST, "rank 0 waits in step "),
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
        "ranks without a place to meet",
        "WORLD_SIZE=2, no MASTER_ADDR",
        nowhere,
        ("WORLD_SIZE=2 without MASTER_ADDR",),
        "nothing was begun",
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
    ),
    Fault(
        "the reader of the output goes",
        "standard output is a pipe that is closed",
        no_reader,
        ("step 48 reached: True",),
        "the run: it trains on",
        goes_on=True,
    ),
    Fault(
        "two runs in one folder",
        "a second run with the same --out",
        in_use,
        ("is in use by another run (process ",),
        "the first run",
    ),
    Fault(
        "a byte of the newest checkpoint is turned",
        "at equal size, then the same command",
        damaged(lambda paths: flip(paths[0])),
        ("is passed over: ", "going on after step"),
        "the checkpoint before it",
        fails=False,
        shown="is passed over: ",
    ),
    Fault(
        "the newest checkpoint is torn",
        "its file cut in half, then the same command",
        damaged(lambda paths: tear(paths[0])),
        ("is passed over: ", "going on after step"),
        "the checkpoint before it",
        fails=False,
    ),
    Fault(
        "all checkpoints are torn",
        "their files cut in half, then the same command",
        damaged(of_all(tear)),
        ("has checkpoints, and none can be taken",),
        "the files, as they are: it does not start from step 0",
    ),
    Fault(
        "the disk is full",
        "a disk of 3.5 MB (tmpfs), where the second checkpoint does not fit",
        full,
        ("was not written: the disk is full: ", "stays the newest"),
        "the checkpoint before it",
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
        Fault(name, f"rank 1 of 3, at step 6: {how}", astray(fault), says, "the process is ended")
        for name, fault, how, says in (
            (
                "an error in a backward",
                "backward",
                "a ValueError in a hook",
                ("RanksLost: rank 1 ended in step 6, backward: ValueError: only here",),
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


def goes_on_after(folder: Path) -> int:
    """Start the run again, on one rank; return the step that it goes on after."""
    ranks = start(folder, [one(folder)])
    ranks.wait_for("going on after step")
    ranks.kill()
    text = ranks.files[0].read_text()
    return int(text.split("going on after step", 1)[1].split()[0].rstrip(".,;:").replace(",", ""))


def silent(fault: Fault, outcome: Outcome) -> str:
    """Return what is wrong with how a fault ended; "" where it is as it must be."""
    wrong = [f"{text!r} was not said" for text in fault.says if text not in outcome.text]
    if fault.fails and any(code == 0 for code in outcome.codes):
        wrong.append(f"exit status {outcome.codes}")
    if outcome.seconds > (most := fault.within + 2 * TIMEOUT):
        wrong.append(f"it took {outcome.seconds:.0f} s, may take {most:.0f}")
    return "; ".join(wrong)
