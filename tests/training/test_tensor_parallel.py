"""Layers cut over ranks: the same step, the same checkpoint, and refusals in words."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lhcp.layer.mode import set_mode
from lhcp.training import checkpoint
from lhcp.training.data import open_data
from lhcp.training.model import Joined
from lhcp.training.parallel import build, whole_model
from lhcp.training.run import Run
from lhcp.training.run_checks import check_run
from lhcp.training.stages import Stage
from lhcp.training.step import train_step
from lhcp.training.training_state import tensors_of
from tests.training.test_checkpoint import Silent, do, stop_and_go_on
from tests.training.test_loss_scale import both_modes, on_one_rank, sgd_run

__all__ = ["on_one_rank", "sgd_run"]

RunRanks = Callable[..., list[Any]]


def test_rows_of_a_cut_product_are_each_ranks_parts_together() -> None:
    joined = Joined(3, (4, 2, 2))
    joined.ways = 2
    assert joined.whole_rows().tolist() == [0, 1, 4, 6, 2, 3, 5, 7]
    assert [part.shape[-1] for part in Joined(3, (4, 2)).parts(torch.ones(5, 3))] == [4, 2]


@pytest.mark.parametrize(
    ("cp", "tp", "recompute"),
    [(2, 2, False), (1, 2, True)],
    ids=["dp1cp2tp2", "dp2cp1tp2_recomputed"],
)
def test_step_is_one_ranks(
    cp: int,
    tp: int,
    recompute: bool,
    sgd_run: Run,
    on_one_rank: dict[str, dict[str, list[float]]],
    run_ranks: RunRanks,
) -> None:
    """Fails if a gradient that ranks share counts twice or not at all, or a head meets another's
    keys: losses, norms and held-out loss after steps of SGD, in both modes."""
    meshed = replace(sgd_run, cp=cp, tp=tp, recompute=recompute)
    for result in run_ranks(4, both_modes, meshed):
        for mode, expected in on_one_rank.items():
            for name, values in expected.items():
                assert result[mode][name] == pytest.approx(values, rel=3e-6), (mode, name)


def first_after(group: object, run: Run) -> tuple[int, tuple[float, ...], dict[str, Tensor]]:
    """Return where a run in its folder starts, the numbers of its first step there, and all tensors
    that it found, whole."""
    trainee = build(run, torch.device("cpu"))
    newest = checkpoint.latest(run.folder)
    assert newest is not None
    checkpoint.load(newest, trainee.model, trainee.optimizer)
    state = tensors_of(trainee.model, trainee.optimizer)
    found = {
        f"{kind}.{name}": x.full_tensor() if isinstance(x, DTensor) else x.clone()
        for kind in ("model", "optimizer")
        for name, x in state[kind].items()
    }
    watcher = Silent(stop_after=4)
    with pytest.raises(InterruptedError):
        do(run, watcher)
    return watcher.started_at, watcher.numbers[0], found


def stop_after_three(group: object, run: Run) -> None:
    with pytest.raises(InterruptedError):
        do(run, Silent(stop_after=3))


def drawn(group: object, run: Run) -> dict[str, Tensor]:
    whole = whole_model(run, build(run, torch.device("cpu")))
    return {} if whole is None else dict(whole.state_dict())


def test_weights_are_drawn_and_gathered_as_one_ranks(
    one_rank: None, run_ranks: RunRanks, small_run: Run
) -> None:
    """Fails if whole rows come back in a cut model's order."""
    want = drawn(None, small_run)
    found = run_ranks(4, drawn, replace(small_run, cp=2, tp=2))[0]
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize("cut_first", [True, False], ids=["tp to one rank", "one rank to tp"])
def test_a_checkpoint_goes_on_with_layers_cut_otherwise(
    cut_first: bool, one_rank: None, run_ranks: RunRanks, small_run: Run, tmp_path: Path
) -> None:
    """Fails if a weight or a moment of the optimiser is another row's on the other side."""
    whole = replace(small_run, out=str(tmp_path / "out"))
    meshed = replace(whole, cp=2, tp=2)
    if cut_first:
        run_ranks(4, stop_after_three, meshed)
    else:
        stop_after_three(None, whole)
    started, want, tensors = first_after(None, whole)
    assert started == 2 and any("exp_avg_sq" in name for name in tensors)
    for start, found, others in run_ranks(4, first_after, meshed):
        assert start == started and found == pytest.approx(want, rel=1e-5)
        assert others.keys() == tensors.keys()
        assert all(torch.equal(others[name], tensors[name]) for name in tensors)


def test_resume_is_bit_for_bit(run_ranks: RunRanks, small_run: Run, tmp_path: Path) -> None:
    run = replace(small_run, cp=2, tp=2, out=str(tmp_path / "out"))
    # Only rank 0 has whole weights to compare.
    assert run_ranks(4, stop_and_go_on, run, 4)[0] == [True] * 4


@pytest.mark.parametrize(
    ("changes", "world_size", "said"),
    [
        ({"tp": 4}, 4, r"tp=4: must divide the model's num_heads=4, num_kv_heads=2.*\[1, 2\]"),
        ({"tp": 0}, 4, r"tp=0: must divide the model's"),
        ({"tp": 2}, 3, r"tp=2: must divide the 3 ranks of the run; start a multiple of 2"),
        ({"tp": 2, "cp": 4}, 4, r"cp=4: must divide the 4 ranks of the run / tp = 2, .*\[1, 2\]"),
        ({"tp": 2, "global_batch": 3}, 4, r"global_batch=3: .* dp \* accumulate = 2 \* 1"),
    ],
)
def test_what_does_not_fit_is_refused(
    small_run: Run, changes: dict[str, int], world_size: int, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        check_run(replace(small_run, **changes), world_size)


SEEDS = range(6)


def first_losses(group: object, run: Run) -> list[float]:
    """Return the loss of the first step from each of several seeds, on the same text."""
    data = open_data(run.data, run.seqlen, run.seed)
    stages = (Stage(name="only", mode="lighthouse", steps=1),)
    found = []
    for seed in SEEDS:
        trainee = build(replace(run, seed=seed), torch.device("cpu"))
        set_mode(trainee.model, "lighthouse")
        found.append(train_step(run, trainee, data.train, stages, 0).loss)
    return found


@pytest.mark.slow
def test_bfloat16_errs_as_on_one_rank(one_rank: None, run_ranks: RunRanks, small_run: Run) -> None:
    """Fails if partial sums of cut layers lose more than rounding does anyway.

    Near the start equal bytes have nearly equal logits, so that their rounding does not average out
    over a text: a loss is off by some 1e-3 of itself, up or down by seed, on any ranks.
    """
    model = replace(small_run.model, dim=256, head_dim=32, hidden_dim=384, num_layers=4)
    run = replace(small_run, model=model, global_batch=1, dtype="fp32")
    exact, one = (
        torch.tensor(first_losses(None, replace(run, dtype=dtype))) for dtype in ("fp32", "bf16")
    )
    cut = torch.tensor(run_ranks(4, first_losses, replace(run, dtype="bf16", cp=2, tp=2))[0])
    rms = {
        name: (x - exact).square().mean().sqrt().item() for name, x in (("one", one), ("cut", cut))
    }
    assert 0 < rms["cut"] <= 2 * rms["one"], rms
