"""What provokes a fault: each function strikes, or starts, a run in a folder."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from bench.rotation.namespaces import NotAllowed, nodes
from tests.faults.disks import small_disk
from tests.faults.runs import RUN, Outcome, alive, children, start, torchrun

TWO = ["tiny", "--cp", "2", *RUN]
ONE = ["tiny", *RUN]


def run_of(folder: Path) -> Path:
    """Return the run's folder."""
    return folder / "run"


def two(folder: Path, *more: str) -> list[str]:
    """Return the arguments of one of two ranks."""
    return [*TWO, "--out", str(run_of(folder)), *more]


def one(folder: Path, *more: str) -> list[str]:
    """Return the arguments of a run of one rank."""
    return [*ONE, "--out", str(run_of(folder)), *more]


def struck(number: int, rank: int = 1, world: int = 2) -> Callable[[Path], Outcome]:
    """Send a signal to one of so many ranks in their steps."""

    def provoke(folder: Path) -> Outcome:
        ranks = start(folder, [two(folder)] * world)
        ranks.wait_for("30/800  loss")
        ranks.strike(rank, number)
        return ranks.end()

    return provoke


def cut_off(folder: Path) -> Outcome:
    """Let each of two ranks have a node of its own, and pull a cable for good."""
    try:
        with nodes(2) as network:
            inside = [("ip", "netns", "exec", name) for name in network.names]
            place = {"MASTER_ADDR": network.address(0), "GLOO_SOCKET_IFNAME": "eth0"}
            ranks = start(folder, [two(folder)] * 2, inside=inside, **place)
            ranks.wait_for("30/800  loss")
            ranks.struck = time.monotonic()
            network.plug(1, False)
            return ranks.end()
    except NotAllowed as error:
        raise PermissionError(str(error)) from error


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


def frozen_at_start(folder: Path) -> Outcome:
    """Freeze one of two ranks when they have met, and not connected."""
    words = two(folder, "--timeout", "3")
    ranks = start(folder, [words] * 2, program=["-m", "tests.faults.freezes"])
    ranks.frozen.add(1)
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


def full(folder: Path) -> Outcome:
    """Train where the second checkpoint does not fit."""
    with small_disk(folder / "disk", 3500) as disk:
        given = [*TWO, "--out", str(disk.place / "run"), "--keep-checkpoints", "2"]
        outcome = start(folder, [given] * 2, inside=[disk.inside] * 2).end()
        if (disk.seen / "run").exists():
            shutil.copytree(disk.seen / "run", run_of(folder))
    return outcome


def not_shared(folder: Path) -> Outcome:
    """Start two ranks that have disks of their own in one place."""
    with small_disk(run_of(folder), 16 << 10) as disk:
        return start(folder, [two(folder)] * 2, inside=[(), disk.inside]).end()


def overshot(folder: Path) -> Outcome:
    """Take a step that is far too large."""
    huge = ("--optim.kind", "sgd", "--optim.lr", "1e38", "--optim.warmup-steps", "10")
    ranks = start(folder, [two(folder, *huge, "--checkpoint-every", "1")] * 2)
    ranks.wait_for("1/800  loss")
    ranks.struck = time.monotonic()
    return ranks.end()


def no_reader(folder: Path) -> Outcome:
    """Close the pipe that a run prints to, and see it train on."""
    ranks = start(folder, [one(folder)], program=["tests/faults/no_reader.py"])
    newest = run_of(folder) / "two_stages" / "step-00000048"
    deadline = time.monotonic() + 60
    while not newest.exists() and time.monotonic() < deadline and ranks.processes[0].poll() is None:
        time.sleep(0.05)
    reached = newest.exists()
    ranks.strike(0, signal.SIGTERM)
    ended = ranks.end()
    return Outcome(ended.codes, [*ended.said, f"step 48 reached: {reached}"], ended.seconds)


def goes_on_after(folder: Path) -> int:
    """Start the run again, on one rank; return the step that it goes on after."""
    ranks = start(folder, [one(folder)])
    ranks.wait_for("going on after step")
    ranks.kill()
    text = ranks.files[0].read_text()
    return int(text.split("going on after step", 1)[1].split()[0].rstrip(".,;:").replace(",", ""))
