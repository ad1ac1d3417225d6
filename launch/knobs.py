"""What do k, p, L, the scorer and dense layers do? `python launch/knobs.py knobs_tiny`.

    python launch/knobs.py knobs_tiny --knobs "" "lighthouse.topk 16" --seeds 0 1
    for seed in 0 1; do
      CUDA_VISIBLE_DEVICES=$seed python launch/knobs.py knobs_2k_to_16k --seeds $seed & done; wait
    python launch/knobs_page.py runs/knobs_2k_to_16k runs/of_another_day --page bench/results

Each knob is the recipe with a few flags changed, trained with one split of steps: the lighthouse
stage, then equally many dense steps for all. All knobs of a seed begin from one short stage, where
the recipe has one: it is trained first, once, and other processes wait for it. Processes that are
started alike share the work: each takes the next knob that nobody has. Cut at any moment, the same
command goes on.
"""

import sys
from dataclasses import dataclass

import tyro

from lhcp.training import knobs_page, knobs_results, short_results
from lhcp.training.experiments import KNOBS
from lhcp.training.knobs import Knobs, turn_knobs
from lhcp.training.process import Process, run_to_exit
from lhcp.training.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Arguments(Knobs):
    """A recipe of an experiment and what to do with its results."""

    page: bool = True
    """Whether to end with a page and its pictures in --out, which needs matplotlib."""


def main(arguments: Arguments, own: Process) -> None:
    """Do what nobody has done; then show what there is."""
    arguments.check(own.world_size)
    turn_knobs(arguments, own, Progress(shown=own.rank == 0))
    if arguments.page and own.rank == 0:
        # Knobs that other processes have done are shown too.
        folder = arguments.run.folder
        rows, shorts = knobs_results.read([folder]), short_results.read_short([folder])
        print(f"page: {knobs_page.write(rows, folder, shorts)}", flush=True)


if __name__ == "__main__":
    recipes = {
        name: (recipe.__doc__ or "", Arguments(**vars(recipe()))) for name, recipe in KNOBS.items()
    }
    try:
        chosen = tyro.extras.overridable_config_cli(recipes)
    except ValueError as error:
        sys.exit(f"launch/knobs.py: {error}")
    run_to_exit(
        lambda own: main(chosen, own),
        chosen.run.timeout,
        chosen.run.folder if chosen.run.debug else None,
    )
