"""Train on several ranks under launch/torchrun.sh while all goes wrong that can, at random.

    python -m tests.evidence.soak_faults --minutes 20 --out bench/results/soak_faults_cpu_DATE
    python -m tests.evidence.soak_faults --nodes 1 --ranks 2   # without namespaces; a GPU each

Strikes come every few seconds: SIGKILL or SIGSTOP to a random rank; of two nodes, which are
network namespaces, one's cable is out for 1 to 30 s; a file of the newest checkpoint is torn,
changed or gone, and a rank killed. An agent of torchrun that fails is started again, as by a
scheduler. The run must go on from its checkpoints each time, memory and open files of the agents
must stay flat, and afterwards no process, no shared memory and nothing unfinished may be left.
Then the run is left alone to its end, and its losses must be those of a run that nobody struck,
bit for bit. That one goes beside it, or after it where the cables are its own too.
"""

import argparse
import itertools
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from bench.common.arguments import make_parser
from bench.common.card import dated_card
from bench.common.page import Page
from bench.rotation.namespaces import NotAllowed, nodes
from lhcp.console import escape_unprintable
from lhcp.training.checkpoint_files import Record
from tests.evidence.agents import Agents
from tests.evidence.strikes import Striker, checkpoints
from tests.faults.runs import alive

RUN = [
    *("tiny", "--cp", "2", "--eval-every", "1000", "--sample-bytes", "0", "--seqlen", "256"),
    *("--lighthouse.topk", "8", "--eval-sequences", "4", "--optim.warmup-steps", "4"),
    *("--checkpoint-every", "5", "--keep-checkpoints", "3"),
]


def shared_memory() -> set[str]:
    """Return what torch and Python have in /dev/shm."""
    names = [path.name for path in Path("/dev/shm").glob("*")]
    return {name for name in names if name.startswith(("torch", "psm", "sem", "gloo"))}


def losses(folder: Path) -> list[Any]:
    """Return losses and gradient norms of the newest checkpoint's history."""
    steps = Record.read(checkpoints(folder)[-1]).beside["history"]["steps"]
    return [(one["step"], one["loss"], one["grad_norm"]) for one in steps]


def soak(page: Page, args: argparse.Namespace) -> dict[str, Any]:
    """Strike a run, let it end, and compare it with one that was left alone."""
    before = shared_memory()
    words = [*RUN, "--timeout", str(args.timeout)]
    words += ["--lighthouse-steps", str(args.steps), "--dense-steps", str(args.steps)]
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        network = stack.enter_context(nodes(args.nodes)) if args.nodes > 1 else None
        begin = time.monotonic()

        def agents(name: str) -> Agents:
            started = Agents(
                network, args.ranks, [*words, "--out", str(place / name)], place / f"log of {name}"
            )
            # They end their ranks then.
            stack.callback(started.end)
            return started

        run, folder = agents("struck"), place / "struck" / "two_stages"
        beside = agents("whole") if network is None else None
        striker = Striker(run, network, folder, args.seed, args.ranks)
        found = striker.until(begin + 60 * args.minutes)
        ended_early = run.done
        codes = run.wait(3600)
        minutes = (time.monotonic() - begin) / 60
        run.end()
        left = alive(sorted(run.seen))
        whole_codes = (beside or agents("whole")).wait(3600)
        ended = set(codes) == {0} == set(whole_codes)
        same = ended and losses(folder) == losses(place / "whole" / "two_stages")
        unfinished = [
            path.name for path in folder.parent.rglob("*") if path.name.startswith(".token")
        ] + [path.name for path in folder.glob("*.unfinished*")]
        text = (place / "log of struck").read_text(errors="replace")
    back = sum(b < a for a, b in itertools.pairwise(found.newest))
    checks = {
        "the run ends, with status 0": ended and not ended_early,
        "its losses and gradient norms are those of a run left alone, bit for bit": same,
        "the newest checkpoint never goes back": back == 0,
        "each agent's memory is flat (8 MB)": found.grown(0) < 8,
        "each agent's open files are as many as before (8)": found.grown(1) < 8,
        "no process is left": left == [],
        "no shared memory is left": shared_memory() <= before,
        "nothing unfinished is left in the run's folder": unfinished == [],
    }
    done = found.done
    page.table(
        "Soak",
        f"In {args.minutes:g} minutes (seed {args.seed}) {done['killed']} ranks were killed and "
        f"{done['frozen']} frozen, {done['cut']} cables pulled, {done['torn']} checkpoints "
        f"damaged. {text.count('going on after step')} times the run went on from a checkpoint, "
        f"{text.count(' is passed over: ')} times a checkpoint was passed over, {run.restarted} "
        f"agents were started again. {2 * args.steps} steps were done after {minutes:.1f} minutes. "
        f"Agents grew by at most {found.grown(0):.1f} MB and {found.grown(1):.1f} open files.",
        ("check", "verdict"),
    )
    for check, holds in checks.items():
        page.row(check, "holds" if holds else "DOES NOT HOLD")
        if not holds:
            page.wrong.append(f"not so: {check}")
            print(text[-3000:], file=sys.stderr)
    return {
        "strikes": done,
        "held": found.held,
        "newest": found.newest[-1] if found.newest else 0,
        "seconds": 60 * minutes,
        "status": codes,
        "left": [*left, *unfinished],
        "checks": checks,
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=20, help="of strikes")
    parser.add_argument("--steps", type=int, default=400, help="of each stage")
    parser.add_argument("--seed", type=int, default=0, help="of the strikes")
    parser.add_argument("--nodes", type=int, default=2, choices=(1, 2))
    parser.add_argument("--ranks", type=int, default=4, choices=(2, 4), help="of all nodes")
    parser.add_argument("--timeout", type=float, default=5, help="of the run, seconds")
    parser.add_argument("--out", help="write <out>.md and <out>.json")
    args = parser.parse_args()
    by_nccl = torch.cuda.device_count() >= args.ranks
    device = torch.device("cuda" if by_nccl else "cpu")
    where = f"{args.nodes} network namespaces" if args.nodes > 1 else "one node"
    ranks = f"{args.ranks}, {'NCCL' if by_nccl else 'gloo'}; dp {args.ranks // 2} x cp 2; {where}"
    page = Page(
        "Training while all goes wrong that can", dated_card(device, ranks=ranks, sizes="tiny")
    )
    try:
        record = soak(page, args)
    except NotAllowed as error:
        sys.exit(f"network namespaces are not possible here ({error}); --nodes 1 does without")
    page.close(args.out, [record])


if __name__ == "__main__":
    escape_unprintable()
    main()
