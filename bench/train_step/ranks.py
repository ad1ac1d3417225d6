"""What a training step takes on these ranks: FSDP2 x context parallelism.

    torchrun --nproc-per-node 8 -m bench.train_step.ranks --recipe paper_256k_cp8
    torchrun --nproc-per-node 8 -m bench.train_step.ranks --recipe paper_1m_cp8 --modes lighthouse
    torchrun --nproc-per-node 2 -m bench.train_step.ranks --recipe tiny_cp4 --device cpu --dp 2

A recipe of lhcp/training/recipes.py with one sequence over all ranks; its model, its lengths and
its recomputing. The step is lhcp/training/loop.py's. Seconds are of the slowest rank, medians over
steps; the rotation's share is what ranks waited for its messages, by the training timers, which do
not see into compiled blocks and graphs. Beside --dp, a sequence for each part of the ranks, it
shows what sharing a sequence costs. The JSON file is written after each mode; the last line is
JSON.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from bench.common.arguments import add_device, add_json, make_parser
from bench.common.card import shown_card
from bench.common.page import last_line, write
from bench.common.ranks import all_ranks, run_on_ranks
from lhcp.comm.mesh import Ranks
from lhcp.layer.mode import set_mode
from lhcp.layer.module import Mode
from lhcp.measure.rank_values import gathered
from lhcp.training.data import open_data
from lhcp.training.efficiency import flops_per_token
from lhcp.training.history import StepRecord
from lhcp.training.model import num_parameters
from lhcp.training.parallel import Trainee, build
from lhcp.training.recipes import RECIPES
from lhcp.training.run import Run
from lhcp.training.run_checks import check_run
from lhcp.training.sequences import Sequences
from lhcp.training.stages import Stage
from lhcp.training.step import train_step

Row = dict[str, Any]


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--recipe", default="paper_256k_cp8", choices=tuple(RECIPES))
    parser.add_argument(
        "--modes", nargs="*", default=["lighthouse", "dense"], choices=("lighthouse", "dense")
    )
    parser.add_argument("--seqlen", type=int, help="tokens, in place of the recipe's")
    parser.add_argument("--topk", type=int, help="k, in place of the recipe's")
    parser.add_argument("--rotation", default="auto")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--compile", action="store_true", help="compile each block, untimed waits")
    parser.add_argument("--graphs", default="auto", choices=("auto", "on", "off"))
    parser.add_argument("--keep", action="store_true", help="keep activations, recompute nothing")
    parser.add_argument("--dp", type=int, default=1, help="ranks / dp share a sequence each")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    add_device(parser)
    add_json(parser)
    args = parser.parse_args()
    if args.steps < 1 or args.warmup < 1:
        parser.error(
            f"--steps {args.steps}, --warmup {args.warmup}: at least 1 of each, since the first "
            "step allocates"
        )
    return args


def run_of(args: argparse.Namespace, world_size: int) -> Run:
    """Return the recipe with a sequence a step for each of the dp groups of ranks."""
    recipe = RECIPES[args.recipe]()
    lighthouse = recipe.lighthouse
    return replace(
        recipe,
        lighthouse=replace(lighthouse, topk=args.topk or lighthouse.topk),
        seqlen=args.seqlen or recipe.seqlen,
        cp=world_size // args.dp,
        global_batch=args.dp,
        eval_sequences=args.dp,
        accumulate=1,
        rotation=args.rotation,
        backend=args.backend,
        compile=args.compile,
        graphs=args.graphs,
        recompute=not args.keep,
    )


def measure_mode(
    run: Run,
    trainee: Trainee,
    data: Sequences,
    mode: Mode,
    args: argparse.Namespace,
    ranks: Ranks,
) -> Row:
    """Do some steps in one mode; a collective of all ranks."""
    device, cuda = trainee.placement.device, trainee.placement.device.type == "cuda"
    stages = (Stage(name=mode, mode=mode, steps=args.warmup + args.steps),)
    set_mode(trainee.model, mode)
    records: list[StepRecord] = []
    for step in range(args.warmup + args.steps):
        if cuda and step == args.warmup:
            torch.cuda.reset_peak_memory_stats(device)
        records.append(train_step(run, trainee, data, stages, step))
    records = records[args.warmup :]
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if cuda else 0.0
    everybody = gathered(([r.seconds for r in records], peak), ranks)
    slowest = [max(seconds) for seconds in zip(*(s for s, _ in everybody), strict=True)]
    seconds = median(slowest)
    rate = run.global_batch * run.seqlen / seconds / ranks.world_size
    flops = flops_per_token(run.model, run.seqlen, run.lighthouse if mode == "lighthouse" else None)
    return {
        "mode": mode,
        "dp": args.dp,
        "graphs": trainee.graphs is not None,
        "without_graphs": dict(trainee.graphs.eager) if trainee.graphs is not None else {},
        "seqlen": run.seqlen,
        "subsequence": run.lighthouse.subsequence_length(run.seqlen),
        "lighthouse_layers": run.model.num_layers - len(run.model.dense_layers),
        "layers": run.model.num_layers,
        "compiled": run.compile,
        "seconds": seconds,
        "least": min(slowest),
        "most": max(slowest),
        "steps": len(slowest),
        "tokens_per_second_per_rank": rate,
        "model_tflop_s_per_rank": flops * rate / 1e12,
        "peak_gib": max(peak for _, peak in everybody),
        "rotation_share": shares_of(records),
        "losses": [r.loss for r in records],
    }


def shares_of(records: Sequence[StepRecord]) -> float | None:
    """Return the median share of the waits; None where they were not timed."""
    shares = [r.rotation_share for r in records if r.rotation_share is not None]
    return median(shares) if shares else None


def print_row(row: Row) -> None:
    share = row["rotation_share"]
    waits = "not timed" if share is None else f"{100 * share:.2f}%"
    print(
        f"{row['mode']:<11} N={row['seqlen']:,} ({row['lighthouse_layers']} of {row['layers']} "
        f"layers sparse in stage 1){' compiled' if row['compiled'] else ''}: "
        f"{row['seconds']:.3f} s a step ({row['least']:.3f}-{row['most']:.3f}), "
        f"{row['tokens_per_second_per_rank']:,.0f} tokens/s a rank, "
        f"{row['model_tflop_s_per_rank']:.1f} TFLOP/s a rank, peak {row['peak_gib']:.1f} GiB, "
        f"rotation's waits {waits}",
        flush=True,
    )


def measure(args: argparse.Namespace, device: torch.device) -> None:
    """Print the card and a row a mode."""
    ranks = all_ranks(device)
    run = run_of(args, ranks.world_size)
    check_run(run, ranks.world_size)
    if args.compile:
        # One compiled block a mode and kind of layer, each of static shape.
        torch._dynamo.config.recompile_limit = 64
    data = open_data(run.data, run.seqlen, run.seed, run.shortest_document).train
    trainee = build(run, device)
    more = {"recipe": args.recipe, "parameters": num_parameters(trainee.model), "cp": run.cp}
    facts = shown_card(device, ranks, **more)
    document: dict[str, Any] = {"card": facts, "rows": []}
    for mode in args.modes:
        row = measure_mode(run, trainee, data, mode, args, ranks)
        document["rows"].append(row)
        trainee.release()
        if ranks.rank == 0:
            print_row(row)
            write(document, args.json)
    if ranks.rank == 0:
        last_line(document, args.json)


if __name__ == "__main__":
    run_on_ranks(measure, parse())
