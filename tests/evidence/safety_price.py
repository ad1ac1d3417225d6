"""What do watchdog, agreement and safe checkpoints cost a training step?

    torchrun --standalone --nproc-per-node 2 -m tests.evidence.safety_price \\
        --recipe paper_98k --cp 2 --out bench/results/safety_price_DATE

Steps with and without a watchdog are timed in turns; their difference is below what a clock sees,
so each part is timed alone too: marks and the numbers in the loss's sum, by a step; posts, by a
second, as a share of one host thread; look-ups of the agreement, by an attention call; digests and
the look at all weights, by a save. The sum of the parts, over a step, is
the price; the goal is 0.2%. Ends with status 1 where it is missed.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.common.arguments import make_parser
from bench.common.card import dated_card
from bench.common.page import Page
from lhcp.comm.agreement import agreed
from lhcp.comm.mesh import Ranks
from lhcp.comm.torch_private import store_of
from lhcp.comm.watchdog import Watchdog
from lhcp.comm.whereabouts import Whereabouts
from lhcp.console import escape_unprintable
from lhcp.layer.module import LighthouseAttention
from lhcp.training import checkpoint
from lhcp.training.checkpoint_files import describe
from lhcp.training.data import Sequences, TrainingData, open_data
from lhcp.training.parallel import Trainee, build
from lhcp.training.process import Process, run_to_exit
from lhcp.training.recipes import RECIPES
from lhcp.training.run import Run
from lhcp.training.step import train_step
from lhcp.training.training_state import not_finite, tensors_of

GOAL = 0.002
"""Share of a step."""


def seconds_of(do: Callable[[], object], times: int = 1000) -> float:
    """Return the median seconds of one call on the host, of seven rounds of calls."""
    rounds = []
    for _ in range(7):
        begin = time.perf_counter()
        for _ in range(times):
            do()
        rounds.append((time.perf_counter() - begin) / times)
    return statistics.median(rounds)


def step_seconds(
    run: Run, trainee: Trainee, data: Sequences, rounds: int
) -> dict[str, list[float]]:
    """Return the seconds of steps with and without a watchdog, in turns."""
    found: dict[str, list[float]] = {"without": [], "with": []}
    number = 0

    def block(arm: str, trainee: Trainee) -> None:
        nonlocal number
        for index in range(6):
            record = train_step(run, trainee, data, run.stages, number)
            number = (number + 1) % run.lighthouse_steps
            # The first may still do what the other arm's last one left.
            if index:
                found[arm].append(record.seconds)

    for _ in range(2):
        block("without", trainee)
    found["without"].clear()
    for _ in range(rounds):
        block("without", trainee)
        with Watchdog(timeout=600) as watchdog:
            block("with", dataclasses.replace(trainee, marks=watchdog))
    return found


def save_seconds(run: Run, trainee: Trainee, folder: Path) -> dict[str, float]:
    """Return the seconds of a save, and of what makes it safe."""

    def save() -> None:
        beside: dict[str, Any] = {}
        checkpoint.save(folder, 1, trainee.model, trainee.optimizer, beside=beside, keep=1)

    save()
    whole = seconds_of(save, 1)
    state = tensors_of(trainee.model, trainee.optimizer)
    found = {"save": whole, "finite": seconds_of(lambda: not_finite(state), 1)}
    path = folder / "step-00000001"
    mine = f"__{dist.get_rank()}_0.distcp"
    found["digest"] = seconds_of(lambda: describe(path, [mine]), 1)
    return found


def price(run: Run, own: Process, rounds: int, page: Page) -> dict[str, Any]:
    """Measure all parts; fill the page; return the numbers. Every rank calls it."""
    data: TrainingData = open_data(run.data, run.seqlen, run.seed)
    trainee = build(run, own.device)
    for group in trainee.optimizer.param_groups:
        group["lr"] = 0.0
    times = step_seconds(run, trainee, data.train, rounds)
    without, with_ = (statistics.median(times[arm]) for arm in ("without", "with"))
    marks = Watchdog(timeout=600)
    layers = sum(isinstance(m, LighthouseAttention) for m in trainee.model.modules())
    ranks = Ranks(trainee.placement.cp_group)
    agreed(ranks, "priced", lambda: None, lambda _: {})
    assert dist.group.WORLD is not None
    store = store_of(dist.group.WORLD)
    parts = {
        "marks": (2 * run.accumulate + 1) * seconds_of(lambda: marks.at("forward", 1)),
        "agreement": layers
        * run.accumulate
        * seconds_of(lambda: agreed(ranks, "priced", lambda: None, lambda _: {})),
        "numbers in the sum": 2
        * seconds_of(lambda: torch.full((), 1.0, dtype=torch.float64, device=own.device)),
        # Two posts a second; its set leaves the interpreter to others.
        "posts": 2 * without * seconds_of(lambda: store.set("price", Whereabouts().to_json()), 200),
    }
    with tempfile.TemporaryDirectory() as name:
        place = [name]
        dist.broadcast_object_list(place)
        saves = save_seconds(run, trainee, Path(place[0]))
        dist.barrier()
    parts["saves"] = (saves["finite"] + saves["digest"]) / run.checkpoint_every
    total = sum(parts.values())
    page.table(
        "Price of one step",
        f"N={run.seqlen:,}, {layers} layers, step {1e3 * without:.2f} ms (median of "
        f"{len(times['without'])}), with a watchdog {1e3 * with_:.2f} ms "
        f"({with_ / without - 1:+.2%}); a save takes {saves['save']:.2f} s, every "
        f"{run.checkpoint_every} steps.",
        ("part", "us a step", "share of a step"),
    )
    for name, seconds in parts.items():
        page.row(name, f"{1e6 * seconds:.2f}", f"{seconds / without:.4%}")
    page.row("all", f"{1e6 * total:.2f}", f"{total / without:.4%}")
    if total > GOAL * without:
        page.wrong.append(f"the price is {total / without:.3%} of a step, the goal {GOAL:.1%}")
    trainee.release()
    return {"parts": parts, "steps": times, "saves": saves, "share": total / without}


def main(args: argparse.Namespace, own: Process) -> None:
    """Measure on all ranks, and let rank 0 write the page."""
    run = dataclasses.replace(RECIPES[args.recipe](), cp=args.cp, kernels="auto")
    if args.seqlen:
        run = dataclasses.replace(run, seqlen=args.seqlen)
    batch = args.global_batch or own.world_size // args.cp
    run = dataclasses.replace(run, global_batch=batch, accumulate=1)
    facts = dated_card(own.device, ranks=own.world_size, sizes=f"recipe {args.recipe}")
    title = "Price of watchdog, agreement and safe checkpoints"
    page = Page(title, facts, shown=own.rank == 0)
    found = price(run, own, args.rounds, page)
    if own.rank == 0:
        page.close(args.out, [found])


if __name__ == "__main__":
    escape_unprintable()
    parser = make_parser(__doc__)
    parser.add_argument("--recipe", default="tiny", choices=[*RECIPES])
    parser.add_argument("--cp", type=int, default=1)
    parser.add_argument("--seqlen", type=int, help="in place of the recipe's")
    parser.add_argument("--global-batch", type=int, help="sequences a step; none: one a cp group")
    parser.add_argument("--rounds", type=int, default=10, help="of five steps with and without")
    parser.add_argument("--out", help="write <out>.md and <out>.json")
    asked = parser.parse_args()
    run_to_exit(lambda own: main(asked, own))
