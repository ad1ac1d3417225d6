"""What do watchdog, agreement and safe checkpoints cost a training step?

    torchrun --standalone --nproc-per-node 2 -m tests.evidence.safety_price \\
        --recipe paper_98k --layers 8 --seqlen 32768 --cp 2 --out bench/results/safety_price_DATE

Steps with and without a watchdog are timed in turns, in pairs of blocks whose order alternates;
the mean difference of the pairs has its standard error beside it. That is mostly below what a
clock sees, so each part is timed alone too: marks and the numbers in the loss's sum, by a step;
posts, by a second, as a share of one host thread; look-ups of the agreement, by an attention
call; digests and the look at all weights, by a save. The sum of the parts, over a step, is the
price; the goal is 0.2%. Ends with status 1 where it is missed.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
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
from lhcp.training.data import TrainingData, open_data
from lhcp.training.parallel import Trainee, build
from lhcp.training.process import Process, run_to_exit
from lhcp.training.recipes import RECIPES
from lhcp.training.run import Run
from lhcp.training.sequences import Sequences
from lhcp.training.step import train_step
from lhcp.training.training_state import not_finite, tensors_of

GOAL = 0.002
"""Share of a step."""
BLOCK = 5
"""Steps of one arm that follow one another."""


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

    def block(arm: str) -> None:
        nonlocal number
        with Watchdog(timeout=600) if arm == "with" else nullcontext() as watchdog:
            marked = trainee if watchdog is None else dataclasses.replace(trainee, marks=watchdog)
            seconds = []
            for _ in range(BLOCK + 1):
                seconds.append(train_step(run, marked, data, run.stages, number).seconds)
                number = (number + 1) % run.lighthouse_steps
        # The first may still do what the other arm's last one left.
        found[arm] += seconds[1:]

    for _ in range(2):
        block("without")
    found["without"].clear()
    for index in range(rounds):
        for arm in ("without", "with") if index % 2 else ("with", "without"):
            block(arm)
    return found


def difference(times: dict[str, list[float]]) -> tuple[float, float]:
    """Return the mean, over pairs of blocks, of how much longer the median step with a watchdog is,
    as a share of one without, and its standard error."""
    blocks = {
        arm: [statistics.median(x[i : i + BLOCK]) for i in range(0, len(x), BLOCK)]
        for arm, x in times.items()
    }
    shares = [b / a - 1 for a, b in zip(blocks["without"], blocks["with"], strict=True)]
    return statistics.mean(shares), statistics.stdev(shares) / len(shares) ** 0.5


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
    more, error = difference(times)
    without, with_ = (statistics.median(times[arm]) for arm in ("without", "with"))
    marks = Watchdog(timeout=600)
    layers = sum(isinstance(m, LighthouseAttention) for m in trainee.model.modules())
    ranks = Ranks(trainee.placement.ranks.flat)
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
        f"{len(times['without'])}), with a watchdog {1e3 * with_:.2f} ms: {more:+.3%} +- "
        f"{error:.3%} in {rounds} pairs of {BLOCK} steps; a save takes {saves['save']:.2f} s, "
        f"every {run.checkpoint_every} steps.",
        ("part", "us a step", "share of a step"),
    )
    for name, seconds in parts.items():
        page.row(name, f"{1e6 * seconds:.2f}", f"{seconds / without:.4%}")
    page.row("all", f"{1e6 * total:.2f}", f"{total / without:.4%}")
    if total > GOAL * without:
        page.wrong.append(f"the price is {total / without:.3%} of a step, the goal {GOAL:.1%}")
    if more - 2 * error > GOAL:
        page.wrong.append(f"steps with a watchdog are {more:.3%} longer, the goal {GOAL:.1%}")
    trainee.release()
    return {
        "parts": parts,
        "steps": times,
        "saves": saves,
        "share": total / without,
        "pairs": [more, error],
    }


def main(args: argparse.Namespace, own: Process) -> None:
    """Measure on all ranks, and let rank 0 write the page."""
    run = dataclasses.replace(RECIPES[args.recipe](), cp=args.cp, kernels="auto")
    if args.layers:
        model = dataclasses.replace(run.model, num_layers=args.layers, dense_layers=(0,))
        run = dataclasses.replace(run, model=model)
    if args.eager:
        run = dataclasses.replace(run, compile=False)
    if args.seqlen:
        run = dataclasses.replace(run, seqlen=args.seqlen)
    batch = args.global_batch or own.world_size // args.cp
    run = dataclasses.replace(run, global_batch=batch, accumulate=1)
    facts = dated_card(
        own.device,
        ranks=own.world_size,
        sizes=f"recipe {args.recipe}, {run.model.num_layers} layers",
    )
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
    parser.add_argument("--layers", type=int, help="in place of the recipe's; the first is dense")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--global-batch", type=int, help="sequences a step; none: one a cp group")
    parser.add_argument("--rounds", type=int, default=10, help="pairs of blocks")
    parser.add_argument("--out", help="write <out>.md and <out>.json")
    asked = parser.parse_args()
    run_to_exit(lambda own: main(asked, own))
