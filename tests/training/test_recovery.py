"""Recovery: the shared stage changes no bit, and a cut run goes on."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lhcp.training import checkpoint, recovery_results
from lhcp.training.data import DataConfig, open_data
from lhcp.training.experiments import RECOVERIES
from lhcp.training.loop import train
from lhcp.training.model import Decoder, num_parameters
from lhcp.training.parallel import attention_factory, build, whole_model
from lhcp.training.process import Process
from lhcp.training.recovery import Recovery, Split, recover_seed
from lhcp.training.recovery_report import compare
from lhcp.training.recovery_results import ArmResult
from lhcp.training.run import Run
from lhcp.training.stages import OptimConfig
from tests.training.teller import Teller

RunRanks = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, and the folder of a recovery of it that is done when first asked for."""
    place = tmp_path_factory.mktemp("recovery")
    (place / "text").write_bytes(bytes(range(32, 127)) * 400)
    return place


@pytest.fixture
def finished(recovery: Recovery, shared: Path, one_rank: None) -> Recovery:
    """The recovery, with all done in its folder."""
    done = shared / "done"
    if not done.exists():
        do(replace(recovery, run=replace(recovery.run, out=str(done))), Teller())
    shutil.copytree(done, recovery.run.folder)
    return recovery


@pytest.fixture
def recovery(small_run: Run, shared: Path, tmp_path: Path) -> Recovery:
    """Two splits of five and six steps; the shorter stage ends inside the longer one."""
    text = shared / "text"
    run = replace(
        small_run,
        data=DataConfig(text=(str(text),), heldout=0.2),
        lighthouse_steps=0,
        dense_steps=0,
        # So that a switch is evaluated, and its checkpoint there, by its mark alone.
        eval_every=4,
        keep_checkpoints=1,
        out=str(tmp_path / "shared"),
    )
    return Recovery(run=run, splits=("3+2", "2+4"), seeds=(0,))


def do(recovery: Recovery, teller: Teller, seed: int = 0) -> dict[str, ArmResult]:
    """Do one seed on this rank, and return its results."""
    world_size = torch.distributed.get_world_size()
    own = Process(torch.distributed.get_rank(), world_size, torch.device("cpu"))
    recovery.check(world_size)
    recover_seed(recovery, seed, own, teller)
    return recovery_results.read(results_file(recovery, seed))


def results_file(recovery: Recovery, seed: int = 0) -> Path:
    return recovery_results.path_of(recovery.run.folder, recovery.run.name, seed)


def without_times(history: dict[str, Any]) -> list[Any]:
    """Return all that a history's records say but how long it took."""
    times = ("seconds", "tokens_per_second", "rotation_share")
    steps = [{k: v for k, v in step.items() if k not in times} for step in history["steps"]]
    return [*steps, *history["evals"]]


def same_as_alone(group: object, recovery: Recovery, arms: tuple[str, ...]) -> list[bool]:
    """Tell whether the arms' records and weights are those of runs that share nothing."""
    do(recovery, Teller())
    return [same for arm in arms for same in arm_as_alone(recovery, arm)]


def arm_as_alone(recovery: Recovery, arm: str) -> list[bool]:
    run = recovery.run_of(arm)
    data, alone = open_data(run.data, run.seqlen, 0), build(run, torch.device("cpu"))
    stages = run.baseline_stages if arm == "dense" else run.stages
    history = train(run, alone, data, stages, Path(f"{run.out}_{arm}"), Teller())
    shared = build(run, torch.device("cpu"))
    found = checkpoint.latest(run.folder / "seed0" / arm)
    assert found is not None
    checkpoint.load(found, shared.model, shared.optimizer)
    # Others' marks are evaluations more.
    own = {record.step for record in history.evals}
    records = without_times(checkpoint.read_beside(found)[1]["history"])
    records = [r for r in records if "mode" not in r or r["step"] in own]
    weights = [whole_model(run, trainee) for trainee in (alone, shared)]
    a, b = ({} if model is None else model.state_dict() for model in weights)
    return [records == without_times(asdict(history)), all(torch.equal(a[n], b[n]) for n in a)]


def test_sharing_changes_no_bit(finished: Recovery) -> None:
    """Fails if a split from the shared stage, or dense, is not the run that shares nothing."""
    assert same_as_alone(None, finished, ("dense", "3+2", "2+4")) == [True] * 6


def test_sharing_changes_no_bit_on_two_ranks(run_ranks: RunRanks, recovery: Recovery) -> None:
    two = replace(recovery, run=replace(recovery.run, cp=2))
    assert run_ranks(2, same_as_alone, two, ("2+4",)) == [[True, True]] * 2


def untimed(results: dict[str, ArmResult]) -> dict[str, Any]:
    """Return what is the same whenever and wherever it was made."""
    return {
        name: (r.stages, r.columns["loss"], r.columns["grad_norm"], r.evals, r.identity)
        for name, r in results.items()
    }


@pytest.mark.usefixtures("one_rank")
def test_a_cut_recovery_goes_on(finished: Recovery, tmp_path: Path) -> None:
    """Fails if taking up again changes a record, or does again what was finished."""
    whole = recovery_results.read(results_file(finished))
    run = replace(finished.run, checkpoint_every=1, out=str(tmp_path / "cut"))
    recovery = replace(finished, run=run)
    steps = 0
    # Dense takes 6 steps, the stage 3, the first split's tail 2, the second's 4. Each step that
    # was not cut off has a checkpoint; the cuts are before the first one, in the stage, at a
    # tail's first and last step.
    for stop in (1, 8, 2, 2, 4):
        with pytest.raises(InterruptedError):
            do(recovery, Teller(stop_after=stop))
        steps += stop - 1
    teller = Teller()
    again = do(recovery, teller)
    assert untimed(again) == untimed(whole)
    assert list(again) == ["dense", "lighthouse", "3+2", "2+4"]
    assert steps + teller.steps == 6 + 3 + 2 + 4
    before = results_file(recovery).read_bytes()
    idle = Teller()
    do(recovery, idle)
    assert idle.steps == 0 and idle.said.count("done before") == 4
    assert results_file(recovery).read_bytes() == before


def test_results_alone_go_on(finished: Recovery) -> None:
    """Fails if results without checkpoints, on another machine, are of no use, or all that is."""
    shutil.rmtree(finished.run.folder / "seed0")
    idle, teller = Teller(), Teller()
    do(finished, idle)
    assert idle.steps == 0
    # The stage is made again, because a split needs it; dense is not.
    do(replace(finished, splits=(*finished.splits, "1+5")), teller)
    assert teller.steps == 3 + 5


def test_more_splits_take_what_is_there(finished: Recovery) -> None:
    """Fails if a further split does more than its own steps, and those that dense then lacks."""
    teller = Teller()
    results = do(replace(finished, splits=("3+2", "2+4", "4+4")), teller)
    assert teller.steps == (8 - 6) + (4 - 3) + 4
    assert [sum(n for _, n in r.stages) for r in results.values()] == [8, 4, 5, 6, 8]


@pytest.mark.usefixtures("one_rank")
def test_parts_side_by_side_are_one_recovery(recovery: Recovery, tmp_path: Path) -> None:
    """Fails if a part trains the other's arms, or both together are not the whole."""
    whole = do(replace(recovery, splits=("2+2",)), Teller())
    parts, places = {}, []
    for part, steps in (("dense", 4), ("splits", 4)):
        run = replace(recovery.run, out=str(tmp_path / part))
        teller = Teller()
        parts |= do(replace(recovery, run=run, splits=("2+2",), part=part), teller)
        assert teller.steps == steps
        places.append(run.folder)
    assert untimed(parts) == untimed(whole)
    merged = recovery_results.merge(recovery_results.find(places))
    assert [r.arm for r in merged] == ["dense", "lighthouse", "2+2"] and len(compare(merged)) == 1


def test_a_switch_that_left_no_checkpoint_is_named(finished: Recovery) -> None:
    with pytest.raises(ValueError, match=r"step-00000001: no whole checkpoint.*another --out"):
        do(replace(finished, splits=("3+2", "1+5")), Teller())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_batch": 2}, r"seed 0, dense, which is finished: .*global_batch: 4 there, 2 here"),
        ({"splits": ("3+1",)}, r"stages: \[\['dense', 6\]\] there, \[\['dense', 4\]\] here"),
    ],
    ids=["run", "steps"],
)
def test_other_results_are_refused(
    finished: Recovery, change: dict[str, Any], message: str
) -> None:
    """Fails if a folder's finished arms stand for arms that they are not."""
    splits = change.pop("splits", finished.splits)
    other = replace(finished, run=replace(finished.run, **change), splits=splits)
    with pytest.raises(ValueError, match=message):
        do(other, Teller())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim": OptimConfig(decay="cosine")}, "decay='cosine': .*cannot share.*'constant'"),
        ({"splits": ("3+2", "3-2")}, r"splits: '3-2': .*for example 1350\+1350"),
        ({"splits": ("0+5",)}, r"splits: '0\+5': .*each at least 1"),
        ({"splits": ()}, "splits=.*at least one"),
        ({"splits": ("3+2", "03+2")}, "splits=.*two of them are the same"),
        ({"seeds": (0, 1, 0)}, r"seeds=\(0, 1, 0\): .*none of them twice"),
        ({"seeds": (-1,)}, "seeds=.*must not be negative"),
        ({"lighthouse_steps": 3}, "lighthouse_steps.*--splits"),
        ({"seed": 1}, "seed.*--seeds"),
        ({"cp": 2}, "cp=2: must divide"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_experiments_are_named(
    recovery: Recovery, change: dict[str, Any], message: str
) -> None:
    """Fails if an experiment that cannot be done starts."""
    own = {name: change.pop(name) for name in ("splits", "seeds") if name in change}
    wrong = replace(recovery, run=replace(recovery.run, **change), **own)
    with pytest.raises(ValueError, match=message):
        wrong.check(1)


@pytest.mark.parametrize("name", RECOVERIES)
def test_recipe_fits(name: str) -> None:
    recovery = RECOVERIES[name]()
    recovery.check(1)
    assert recovery.run.name == name and RECOVERIES[name].__doc__
    totals = {Split.parse(text).total for text in recovery.splits}
    # So that differences to dense are those at its end.
    assert len(totals) == 1
    with torch.device("meta"):
        model = Decoder(recovery.run.model, attention_factory(recovery.run))
    assert name == "recover_tiny" or round(num_parameters(model) / 1e6) == 26
