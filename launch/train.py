"""Train a recipe: `python launch/train.py tiny`, or under torchrun with several ranks.

    torchrun --standalone --nproc-per-node 2 launch/train.py demo
    python launch/train.py tiny --data.text 'books/*.txt' --seqlen 2048
    python launch/train.py tiny --help

Started again with the same --out it goes on from the newest whole checkpoint.
"""

import sys

import torch.distributed as dist
import tyro
from recipes import RECIPES

from lhcp.training import report
from lhcp.training.data import Sequences, open_corpus
from lhcp.training.loop import train
from lhcp.training.model import generate, num_parameters
from lhcp.training.parallel import build, whole_model
from lhcp.training.process import Process, run_to_exit
from lhcp.training.rotation_report import measure_rotation
from lhcp.training.run import Run


def main(run: Run, own: Process) -> None:
    """Do the run, and its baseline where asked for, and report."""
    run.check(own.world_size)
    progress = report.Progress(shown=own.rank == 0)
    text, rest = open_corpus(run.data)
    data = Sequences(text, run.seqlen, run.seed)
    heldout = Sequences(rest, run.seqlen, run.seed, "held-out")

    trainee = build(run, own.device)
    progress.say(
        f"{run.name}: {num_parameters(trainee.model):,} parameters; {len(text):,} bytes of text, "
        f"{len(rest):,} held out; {own.world_size} ranks on {own.device.type}, "
        f"{trainee.placement.dp_size} x {run.cp} (dp x cp); N={run.seqlen:,}, "
        f"S={run.lighthouse.subsequence_length(run.seqlen):,}"
    )
    history = train(run, trainee, data, heldout, run.stages, run.folder / "two_stages", progress)
    whole = whole_model(run, trainee)
    overhead = measure_rotation(run, trainee)

    baseline = None
    if run.baseline:
        progress.say("baseline: dense from scratch on the same tokens")
        fresh = build(run, own.device)
        stages = run.baseline_stages
        baseline = train(run, fresh, data, heldout, stages, run.folder / "baseline", progress)

    if whole is not None:
        sample = ""
        if run.sample_bytes:
            context = min(run.seqlen, 512)
            made = generate(whole, b"def ", num_bytes=run.sample_bytes, context=context)
            sample = made.decode("utf-8", errors="replace")
        summary = report.summarize(
            run,
            history,
            baseline,
            world_size=dist.get_world_size(),
            overhead=overhead,
            sample=sample,
        )
        report.write(summary, run.folder)


if __name__ == "__main__":
    recipes = {name: (recipe.__doc__ or "", recipe()) for name, recipe in RECIPES.items()}
    try:
        chosen = tyro.extras.overridable_config_cli(recipes)
    except ValueError as error:
        sys.exit(f"launch/train.py: {error}")
    run_to_exit(lambda own: main(chosen, own))
