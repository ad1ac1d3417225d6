"""Train on four gloo ranks under launch/torchrun.sh while ranks are killed and frozen at random.

    python -m tests.evidence.soak_faults --minutes 20 --out bench/results/soak_faults_cpu_DATE

Strikes come every few seconds: SIGKILL, or SIGSTOP, to a random rank. The run must go on from its
checkpoints each time, memory must stay flat (of torchrun's agent, which lives through all of it),
and afterwards no process, no shared memory and no unfinished checkpoint may be left. Then the run
is left alone to its end, and its losses must be those of a run that nobody struck, bit for bit.
"""

import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.common.arguments import make_parser
from bench.common.card import dated_card
from bench.common.page import Page
from lhcp.console import escape_unprintable
from lhcp.training.checkpoint_files import Record
from tests.faults.runs import ROOT, alive, children, free_port

RANKS = 4
RUN = [
    *("tiny", "--cp", "2", "--eval-every", "1000", "--sample-bytes", "0", "--seqlen", "256"),
    *("--lighthouse.topk", "8", "--eval-sequences", "4", "--optim.warmup-steps", "4"),
    *("--checkpoint-every", "5", "--timeout", "5"),
]


def start(out: Path, log: Path, steps: int, restarts: int) -> subprocess.Popen[bytes]:
    """Start the run by the same file as its user."""
    words = ["bash", "launch/torchrun.sh", *RUN, "--out", str(out)]
    words += ["--lighthouse-steps", str(steps), "--dense-steps", str(steps)]
    place = {"HEAD_NODE": f"localhost:{free_port()}", "GPUS_PER_NODE": str(RANKS)}
    here = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment = os.environ | place | here
    environment |= {"MAX_RESTARTS": str(restarts), "PYTHONPATH": str(ROOT)}
    with open(log, "ab") as file:
        return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=file, stderr=file)


def megabytes(pid: int) -> float:
    """Return the resident memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(x.split()[1]) / 1024 for x in lines if x.startswith("VmRSS")), 0.0)


def shared_memory() -> set[str]:
    """Return what torch and Python have in /dev/shm."""
    names = [path.name for path in Path("/dev/shm").glob("*")]
    return {name for name in names if name.startswith(("torch", "psm", "sem", "gloo"))}


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, oldest first."""
    return sorted(folder.glob("step-" + "[0-9]" * 8))


def strike_until(
    deadline: float, agent: subprocess.Popen[bytes], rng: random.Random, folder: Path
) -> dict[str, Any]:
    """Strike ranks at random until the deadline; return what was done and seen."""
    done = {"killed": 0, "frozen": 0}
    memory: list[float] = []
    seen: set[int] = set()
    newest: list[int] = []
    while time.monotonic() < deadline and agent.poll() is None:
        # Most strikes come when the run has got further, some wherever it is, as in a start.
        further = rng.random() < 0.75
        until = time.monotonic() + (90.0 if further else rng.uniform(3.0, 12.0))
        before = newest[-1] if newest else 0
        while time.monotonic() < until and agent.poll() is None:
            time.sleep(0.2)
            seen |= set(children(agent.pid))
            if there := checkpoints(folder):
                newest.append(int(there[-1].name.split("-")[1]))
            if further and newest and newest[-1] > before:
                break
        time.sleep(rng.uniform(0.0, 3.0))
        memory.append(megabytes(agent.pid))
        ranks = children(agent.pid)
        if len(ranks) < RANKS:
            # They are being started.
            continue
        number = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP))
        os.kill(rng.choice(ranks), number)
        done["killed" if number == signal.SIGKILL else "frozen"] += 1
    back = sum(b < a for a, b in itertools.pairwise(newest))
    return {**done, "memory": memory, "seen": sorted(seen), "newest": newest[-1], "back": back}


def losses(folder: Path) -> list[Any]:
    """Return losses and gradient norms of the newest checkpoint's history."""
    steps = Record.read(checkpoints(folder)[-1]).beside["history"]["steps"]
    return [(one["step"], one["loss"], one["grad_norm"]) for one in steps]


def soak(page: Page, minutes: float, steps: int, seed: int) -> dict[str, Any]:
    """Strike a run, let it end, and compare it with one that was left alone."""
    before = shared_memory()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        log = place / "log"
        begin = time.monotonic()
        agent = start(place / "struck", log, steps, restarts=10_000)
        try:
            found = strike_until(
                begin + 60 * minutes, agent, random.Random(seed), place / "struck" / "two_stages"
            )
            ended_early = agent.poll()
            code = agent.wait(timeout=3600)
        finally:
            # It ends its ranks then.
            agent.terminate()
            agent.wait()
        minutes_taken = (time.monotonic() - begin) / 60
        left = alive(found["seen"])
        whole = start(place / "whole", place / "log of whole", steps, restarts=0)
        whole_code = whole.wait(timeout=3600)
        same = code == 0 == whole_code and losses(place / "struck" / "two_stages") == losses(
            place / "whole" / "two_stages"
        )
        unfinished = [p.name for p in (place / "struck" / "two_stages").glob("*.unfinished*")]
        text = log.read_text(errors="replace")
    memory = found["memory"]
    third = max(1, len(memory) // 3)
    grown = sum(memory[-third:]) / third - sum(memory[:third]) / third
    checks = {
        "the run ends, with status 0": code == 0 and ended_early is None,
        "its losses and gradient norms are those of a run left alone, bit for bit": same,
        "the newest checkpoint never goes back": found["back"] == 0,
        "the agent's memory is flat (8 MB)": grown < 8,
        "no process is left": left == [],
        "no shared memory is left": shared_memory() <= before,
        "no unfinished checkpoint is left": unfinished == [],
    }
    page.table(
        "Soak",
        f"{found['killed']} ranks killed and {found['frozen']} frozen in {minutes:g} minutes (seed "
        f"{seed}); {text.count('going on after step')} restarts went on from a checkpoint; "
        f"{2 * steps} steps done after {minutes_taken:.1f} minutes; agent's memory "
        f"{memory[0]:.0f} to {memory[-1]:.0f} MB.",
        ("check", "verdict"),
    )
    for check, holds in checks.items():
        page.row(check, "holds" if holds else "DOES NOT HOLD")
        if not holds:
            page.wrong.append(f"not so: {check}")
            print(text[-3000:], file=sys.stderr)
    return {**found, "seconds": 60 * minutes_taken, "checks": checks}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=20, help="of strikes")
    parser.add_argument("--steps", type=int, default=400, help="of each stage")
    parser.add_argument("--seed", type=int, default=0, help="of the strikes")
    parser.add_argument("--out", help="write <out>.md and <out>.json")
    args = parser.parse_args()
    facts = dated_card(torch.device("cpu"), ranks="4, gloo; dp 2 x cp 2", sizes="recipe tiny")
    page = Page("Training while ranks are killed and frozen", facts)
    page.close(args.out, [soak(page, args.minutes, args.steps, args.seed)])


if __name__ == "__main__":
    escape_unprintable()
    main()
