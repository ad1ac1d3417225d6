"""Training runs whose ranks are started one by one, so that each can be struck and heard alone."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.gpus import SHARED, by_nccl
from tests.signals import heed_interrupts

ROOT = Path(__file__).parents[2]
BY_NCCL = by_nccl(2)
"""Whether the ranks of a run of two use NCCL."""
TIMEOUT = 10.0 if BY_NCCL else 3.0
"""--timeout of the runs, in seconds: of which a GPU's kernels, compiled in the first steps, have
four."""

RUN = [
    *("--lighthouse-steps", "400", "--dense-steps", "400", "--eval-every", "100"),
    *("--sample-bytes", "0", "--seqlen", "256", "--lighthouse.topk", "8", "--eval-sequences", "4"),
    *("--checkpoint-every", "8", "--optim.warmup-steps", "4", "--timeout", f"{TIMEOUT:g}"),
]
"""A run that nobody waits for the end of; a few steps take a second."""


@dataclass(frozen=True)
class Outcome:
    """How ranks ended."""

    codes: list[int | None]
    """Exit status of each; less than 0: a signal's; None: it did not end."""
    said: list[str]
    """All that each printed."""
    seconds: float
    """From the fault to the end of the last rank that ended."""

    @property
    def text(self) -> str:
        """All that all of them printed, in one line."""
        return " ".join(" ".join(self.said).split())


@dataclass
class Ranks:
    """Processes that were started together."""

    processes: list[subprocess.Popen[bytes]]
    files: list[Path]
    struck: float = 0.0
    frozen: set[int] = field(default_factory=set)

    def wait_for(self, text: str, rank: int = 0, patience: float = 90.0) -> None:
        """Wait until a rank has printed the text."""
        deadline = time.monotonic() + patience
        while text not in self.files[rank].read_text(errors="replace"):
            ended = self.processes[rank].poll() is not None
            if ended or time.monotonic() > deadline:
                said = [file.read_text(errors="replace")[-2000:] for file in self.files]
                self.kill()
                raise AssertionError(f"{text!r} was not printed: {said}")
            time.sleep(0.02)

    def strike(self, rank: int, number: int) -> None:
        """Send a rank a signal, and count the time from now on."""
        self.struck = time.monotonic()
        self.processes[rank].send_signal(number)
        if number == signal.SIGSTOP:
            self.frozen.add(rank)

    def end(self, patience: float = 60.0) -> Outcome:
        """Wait until all ranks but the frozen ones have ended; kill what is there after that."""
        begin = self.struck or time.monotonic()
        deadline = time.monotonic() + patience
        waited = [p for rank, p in enumerate(self.processes) if rank not in self.frozen]
        while time.monotonic() < deadline and any(p.poll() is None for p in waited):
            time.sleep(0.02)
        seconds = time.monotonic() - begin
        codes = [process.poll() for process in self.processes]
        self.kill()
        return Outcome(codes, [file.read_text(errors="replace") for file in self.files], seconds)

    def kill(self) -> None:
        """End what is there."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def start(
    folder: Path,
    arguments: Sequence[Sequence[str]],
    program: Sequence[str] = ("-m", "lhcp", "train"),
    inside: Sequence[Sequence[str]] = (),
    **variables: str,
) -> Ranks:
    """Start a rank for each of the arguments, which may differ; one alone is a plain process.

    `inside` has for each rank the words before its command, such as those of a namespace.
    """
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes, files = [], []
    for rank, words in enumerate(arguments):
        # With a GPU each they use NCCL, else gloo. Where they share one, each is a node of its own.
        local, beside = (0, 1) if SHARED else (rank, len(arguments))
        own = {"RANK": str(rank), "WORLD_SIZE": str(len(arguments))}
        own |= {"LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(beside)}
        world = {} if len(arguments) == 1 else place | own
        files.append(folder / f"rank{rank}.{len(list(folder.glob('rank*')))}.log")
        before = inside[rank] if inside else ()
        processes.append(_popen([*program, *words], files[-1], world | variables, before))
    return Ranks(processes, files)


def torchrun(folder: Path, ranks: int, arguments: Sequence[str], restarts: int) -> Ranks:
    """Start torchrun, as one process."""
    words = ["-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(ranks)]
    words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    words += ["--max-restarts", str(restarts), "--monitor-interval", "0.2", "-m", "lhcp", "train"]
    file = folder / f"torchrun{len(list(folder.glob('torchrun*')))}.log"
    return Ranks([_popen([*words, *arguments], file, {})], [file])


def _popen(
    words: Sequence[str], file: Path, variables: dict[str, str], before: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    # What a machine has beside its own packages stays in reach.
    path = os.pathsep.join((str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | variables
    with open(file, "wb") as out:
        return subprocess.Popen(
            [*before, sys.executable, *words],
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=out,
            preexec_fn=heed_interrupts,
        )


def children(pid: int) -> list[int]:
    """Return the processes that a process started, in their order."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except FileNotFoundError:
        return []
    return [int(child) for child in text.split()]


def alive(pids: Sequence[int]) -> list[int]:
    """Return those of the processes that are still there, and no zombies."""
    found = []
    for pid in pids:
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z":
            found.append(pid)
    return found
