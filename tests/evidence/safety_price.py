"""What do watchdog, agreement and safe checkpoints cost a training step?

    torchrun --standalone --nproc-per-node 2 -m tests.evidence.safety_price --eager \\
        --recipe paper_98k --layers 8 --seqlen 65536 --cp 2 --out bench/results/safety_price_DATE

Steps with and without a watchdog are timed in turns, in pairs of blocks of half a second or so,
whose order alternates, each rank on cores of its own, beside nothing else. The mean difference of
the pairs has its standard error beside it: of blocks' medians, and of their means, in which a step
that the watchdog held up counts in full. Slow steps are counted, and those that Python's collection
of garbage made slow, whose time is left out. What is below all that is timed part by part: marks
and the numbers in the loss's sum, by a step; posts, by a second, as a share of one host thread;
look-ups of the agreement, by an attention call. Their sum over a step is the price, and the goal
0.2%. Digests and the look at all weights are timed by a save, and it is said how far saves must be
apart for all of it to be as cheap. Ends with status 1 where the goal is missed.
"""

import argparse
import dataclasses
import os
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
from lhcp.training.process import Process, join, leave
from lhcp.training.recipes import RECIPES
from lhcp.training.run import Run
from lhcp.training.sequences import Sequences
from lhcp.training.step import train_step
from lhcp.training.together import gather
from lhcp.training.training_state import not_finite, tensors_of
from tests.evidence.turns import SLOW, Arm, Turns, stay_on_own_cores, take_turns

GOAL = 0.002
"""Share of a step."""


def seconds_of(do: Callable[[], object], times: int = 1000, rounds: int = 7) -> float:
    """Return the median seconds of one call on the host, of some rounds of calls."""
    found = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(times):
            do()
        found.append((time.perf_counter() - begin) / times)
    return statistics.median(found)


def step_turns(run: Run, trainee: Trainee, data: Sequences, rounds: int, block: int) -> Turns:
    """Return the seconds of steps with and without a watchdog, in turns."""
    number, marked = 0, trainee

    def watch() -> Watchdog:
        nonlocal marked
        watchdog = Watchdog(timeout=600)
        marked = dataclasses.replace(trainee, marks=watchdog)
        return watchdog

    def step(arm: Arm) -> float:
        nonlocal number
        number = (number + 1) % run.lighthouse_steps
        trained = marked if arm == "with" else trainee
        return train_step(run, trained, data, run.stages, number).seconds

    turns = take_turns(step, {"without": nullcontext, "with": watch}, rounds, block)
    for arm, own in turns.collecting.items():
        # A rank that collects keeps the others waiting.
        turns.collecting[arm] = [max(one) for one in zip(*gather(own), strict=True)]
    return turns


def save_seconds(run: Run, trainee: Trainee, folder: Path) -> dict[str, float]:
    """Return the seconds of a save, and of what makes it safe."""

    def save() -> None:
        beside: dict[str, Any] = {}
        checkpoint.save(folder, 1, trainee.model, trainee.optimizer, beside=beside, keep=1)

    save()
    whole = seconds_of(save, 1, 3)
    state = tensors_of(trainee.model, trainee.optimizer)
    found = {"save": whole, "finite": seconds_of(lambda: not_finite(state), 1, 3)}
    path = folder / "step-00000001"
    mine = f"__{dist.get_rank()}_0.distcp"
    found["digest"] = seconds_of(lambda: describe(path, [mine]), 1, 3)
    return found


def price(run: Run, own: Process, rounds: int, block: int, page: Page) -> dict[str, Any]:
    """Measure all parts; fill the page; return the numbers. Every rank calls it."""
    data: TrainingData = open_data(run.data, run.seqlen, run.seed)
    trainee = build(run, own.device)
    for group in trainee.optimizer.param_groups:
        group["lr"] = 0.0
    turns = step_turns(run, trainee, data.train, rounds, block)
    without, with_ = turns.median("without"), turns.median("with")
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
    total = sum(parts.values())
    safe = saves["finite"] + saves["digest"]
    page.table(
        "Price of one step",
        f"N={run.seqlen:,}, {layers} layers, step {1e3 * without:.2f} ms (median of "
        f"{len(turns.seconds['without'])}), with a watchdog {1e3 * with_:.2f} ms.",
        ("part", "us a step", "share of a step"),
    )
    for name, seconds in parts.items():
        page.row(name, f"{1e6 * seconds:.2f}", f"{seconds / without:.4%}")
    page.row("all", f"{1e6 * total:.2f}", f"{total / without:.4%}")
    if total > GOAL * without:
        page.wrong.append(f"the price is {total / without:.3%} of a step, the goal {GOAL:.1%}")
    page.table(
        "Pairs",
        f"{rounds} pairs of {block} steps: how much longer they are with a watchdog, but for "
        "collections of garbage.",
        ("of a block", "longer", "standard error"),
    )
    pairs = {
        "median": turns.difference(statistics.median),
        "mean": turns.difference(statistics.mean),
    }
    for name, (more, error) in pairs.items():
        page.row(name, f"{more:+.3%}", f"{error:.3%}")
        if more - 2 * error > GOAL:
            page.wrong.append(f"by {name}s steps with a watchdog are {more:.3%} longer")
    page.line("")
    for arm in turns.seconds:
        slow, collecting = turns.slow(arm)
        page.line(
            f"Slow steps (over {SLOW:g} times the median) {arm} a watchdog: {slow}, of which "
            f"{collecting} by a collection of garbage, in all "
            f"{1e3 * statistics.mean(turns.collecting[arm]):.2f} ms a step."
        )
    page.line(
        f"A save takes {saves['save']:.2f} s, digest and look at all numbers {safe:.2f} s of it: "
        f"{safe / max(GOAL - total / without, 1e-9):.0f} s from save to save and more, and all of "
        f"it is below {GOAL:.1%}."
    )
    trainee.release()
    return {
        "parts": parts,
        "steps": turns.seconds,
        "collecting": turns.collecting,
        "saves": saves,
        "share": total / without,
        "pairs": pairs,
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
        ranks=f"{own.world_size}, each on {len(os.sched_getaffinity(0))} cores of its own",
        sizes=f"recipe {args.recipe}, {run.model.num_layers} layers",
    )
    title = "Price of watchdog, agreement and safe checkpoints"
    page = Page(title, facts, shown=own.rank == 0)
    found = price(run, own, args.rounds, args.block, page)
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
    parser.add_argument("--rounds", type=int, default=10, help="pairs of blocks, even")
    parser.add_argument("--block", type=int, default=8, help="timed steps of a block")
    parser.add_argument("--out", help="write <out>.md and <out>.json")
    asked = parser.parse_args()
    # First, so that all threads stay there.
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    stay_on_own_cores(int(os.environ.get("LOCAL_RANK", "0")), beside)
    # Not `run_to_exit`, which has a watchdog of its own.
    joined = join()
    main(asked, joined)
    leave(0)
