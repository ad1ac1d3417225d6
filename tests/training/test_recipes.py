"""Every recipe builds, and wrong sizes are named before anything starts."""

from dataclasses import replace

import pytest
import torch

from lhcp.training.model import Decoder, num_parameters
from lhcp.training.parallel import attention_factory
from lhcp.training.recipes import RECIPES
from lhcp.training.run import Run
from lhcp.training.run_checks import check_run


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_builds(name: str) -> None:
    run = RECIPES[name]()
    assert run.name == name and RECIPES[name].__doc__
    for dp in (1, 2, 4):
        if run.global_batch % (dp * run.accumulate) == 0:
            check_run(run, dp * run.cp)
    with torch.device("meta"):
        model = Decoder(run.model, attention_factory(run, None))
    assert num_parameters(model) > 0


@pytest.mark.parametrize("name", ["tiny", "tiny_cp4", "demo"])
def test_small_recipes_have_sizes_that_work(name: str) -> None:
    run = RECIPES[name]()
    config = run.lighthouse
    coarsest = run.seqlen // config.num_strata // config.coarsest_window
    assert coarsest >= 4 * config.picks
    assert config.subsequence_length(run.seqlen) <= run.seqlen // 2


@pytest.mark.parametrize(
    ("change", "world_size", "message"),
    [
        ({"cp": 3}, 4, r"cp=3: must divide the 4 ranks.*\[1, 2, 4\]"),
        ({"global_batch": 3}, 2, r"global_batch=3: .*for example 2"),
        ({"accumulate": 3}, 1, r"global_batch=4: .*for example 3"),
        ({"eval_sequences": 3}, 2, r"eval_sequences=3: .*for example 2"),
        ({"cp": 8}, 8, r"num_strata=8: must be a multiple of 16"),
        ({"seqlen": 500}, 1, r"seqlen=500: .*multiple"),
        ({"checkpoint_every": 0}, 1, r"checkpoint_every=0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_sizes_are_named(
    small_run: Run, change: dict[str, int], world_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_run(replace(small_run, **change), world_size)
