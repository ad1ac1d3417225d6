"""Train a recipe: `lhcp train tiny`, or under torchrun with several ranks.

    torchrun --standalone --nproc-per-node 2 -m lhcp train demo
    lhcp train tiny --data.text 'books/*.txt' --seqlen 2048
    lhcp train tiny --help

Started again with the same --out it goes on from the newest whole checkpoint.
"""

import sys
from collections.abc import Sequence

import torch.distributed as dist
import tyro

from lhcp.training import report
from lhcp.training.checkpoint import Sharing
from lhcp.training.data import open_data
from lhcp.training.generation import generate
from lhcp.training.lock import held
from lhcp.training.loop import train
from lhcp.training.metrics import written
from lhcp.training.model import num_parameters
from lhcp.training.parallel import build, whole_model
from lhcp.training.process import Process, run_to_exit
from lhcp.training.progress import Progress
from lhcp.training.recipes import RECIPES
from lhcp.training.rotation_report import measure_rotation
from lhcp.training.run import SLOW, Run
from lhcp.training.run_checks import check_run
from lhcp.training.short_stage import train_short


def main(run: Run, own: Process) -> None:
    """Do the run, and its baseline where asked for, and report; alone in its folder."""
    check_run(run, own.world_size)
    own.marks.at("start", patience=SLOW)
    progress = Progress(shown=own.rank == 0)
    with held(run.folder) as remark:
        if remark:
            progress.say(remark)
        do(run, own, progress)


def do(run: Run, own: Process, progress: Progress) -> None:
    """Train and report."""
    train_short(run, own, progress)
    sharing = Sharing(weights=run.short_checkpoint)
    data = open_data(run.data, run.seqlen, run.seed, run.shortest_document)
    trainee = build(run, own.device, own.marks)
    progress.say(
        f"{run.name}: {num_parameters(trainee.model):,} parameters; {len(data.train.corpus):,} "
        f"bytes of text, {len(data.heldout.corpus):,} held out; {own.world_size} ranks on "
        f"{own.device.type}, {trainee.placement.dp_size} x {run.cp} x {run.tp} (dp x cp x tp); "
        f"N={run.seqlen:,}, S={run.lighthouse.subsequence_length(run.seqlen):,}"
    )
    if data.heldout.count < run.eval_sequences:
        progress.say(
            f"eval_sequences={run.eval_sequences}, but the held-out text has {data.heldout.count} "
            f"of N={run.seqlen:,}: an evaluation reads them again; raise --data.heldout or name "
            "more text for an estimate with less noise"
        )
    folder = run.folder / "two_stages"
    with written(run, progress, own.rank) as watcher:
        history = train(run, trainee, data, run.stages, folder, watcher, sharing)
    own.marks.at("report", patience=SLOW)
    whole = whole_model(run, trainee)
    overhead = measure_rotation(run, trainee)

    baseline = None
    if run.baseline:
        progress.say("baseline: dense from scratch on the same tokens")
        own.marks.at("start", patience=SLOW)
        fresh = build(run, own.device, own.marks)
        folder = run.folder / "baseline"
        with written(run, progress, own.rank) as watcher:
            stages = run.baseline_stages
            baseline = train(run, fresh, data, stages, folder, watcher, sharing)

    own.marks.at("report", patience=SLOW)
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


def start(arguments: Sequence[str]) -> None:
    """Read the command line and train."""
    recipes = {name: (recipe.__doc__ or "", recipe()) for name, recipe in RECIPES.items()}
    try:
        chosen = tyro.extras.overridable_config_cli(recipes, prog="lhcp train", args=arguments)
    except ValueError as error:
        sys.exit(f"lhcp train: {error}")
    run_to_exit(
        lambda own: main(chosen, own), chosen.timeout, chosen.folder if chosen.debug else None
    )
