"""Does the model recover? `python launch/recover.py recover_tiny`, or a larger recipe on GPUs.

    python launch/recover.py recover_tiny --splits 60+60 80+20 --seeds 0 1 2
    CUDA_VISIBLE_DEVICES=2 python launch/recover.py recover_32k --seeds 2 --out runs/recover
    torchrun --standalone --nproc-per-node 2 launch/recover.py recover_tiny --cp 2
    python launch/recover_page.py runs/recover runs/of_another_day --page bench/results

For each seed: dense from scratch, one lighthouse stage, and every split of steps, each of which
shares that stage and costs its dense steps alone. Cut at any moment, the same command goes on.
A seed's results are one file, NAME_seed0.jsonl in --out; seeds may run side by side.
"""

import sys
from dataclasses import dataclass
from typing import Annotated

import torch.distributed as dist
import tyro

from lhcp.training import recovery_page, recovery_results
from lhcp.training.experiments import RECOVERIES
from lhcp.training.lock import held
from lhcp.training.process import Process, run_to_exit
from lhcp.training.progress import Progress
from lhcp.training.recovery import Part, Recovery, recover_seed, seed_folder
from lhcp.training.run import Run


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """A recipe of an experiment and what to do with its results."""

    run: Annotated[Run, tyro.conf.arg(name="")]
    splits: tuple[str, ...]
    """Lighthouse steps + dense steps of each split; dense from scratch is as long as the longest.
    They may have different totals."""
    seeds: tuple[int, ...]
    """Seeds of weights and of the order of data; each has dense and all splits."""
    part: Part = "all"
    """Dense from scratch alone, the lighthouse stage and its splits alone, or all. Two processes
    may do a part each, in an --out of its own: recover_page.py merges them."""
    page: bool = True
    """Whether to end with a page and its pictures in --out, which needs matplotlib."""

    @property
    def recovery(self) -> Recovery:
        """Return the experiment."""
        return Recovery(run=self.run, splits=self.splits, seeds=self.seeds, part=self.part)


def main(arguments: Arguments, own: Process) -> None:
    """Do each seed alone in its folder; then show what there is."""
    recovery = arguments.recovery
    recovery.check(own.world_size)
    progress = Progress(shown=own.rank == 0)
    for seed in recovery.seeds:
        with held(seed_folder(recovery.run, seed)) as remark:
            if remark:
                progress.say(remark)
            recover_seed(recovery, seed, own, progress)
    if arguments.page and dist.get_rank() == 0:
        # Seeds that other processes have done are shown too.
        results = recovery_results.merge(recovery_results.find([recovery.run.folder]))
        print(f"page: {recovery_page.write(results, recovery.run.folder)}", flush=True)


if __name__ == "__main__":
    recipes = {
        name: (recipe.__doc__ or "", Arguments(**vars(recipe())))
        for name, recipe in RECOVERIES.items()
    }
    try:
        chosen = tyro.extras.overridable_config_cli(recipes)
    except ValueError as error:
        sys.exit(f"launch/recover.py: {error}")
    run_to_exit(
        lambda own: main(chosen, own),
        chosen.run.timeout,
        chosen.run.folder if chosen.run.debug else None,
    )
