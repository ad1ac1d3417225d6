"""The short stage: trained once, what follows has its weights, and another one is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from lhcp.training import checkpoint, knobs_page, knobs_results, short_stage
from lhcp.training.checkpoint import Sharing
from lhcp.training.data import DataConfig, open_data
from lhcp.training.identity import MAY_CHANGE
from lhcp.training.knobs import Knobs, turn_knobs
from lhcp.training.loop import train
from lhcp.training.parallel import build
from lhcp.training.process import Process
from lhcp.training.run import Run
from lhcp.training.run_checks import check_run
from lhcp.training.short import Short
from lhcp.training.short_results import read_short
from lhcp.training.short_stage import train_short
from tests.training.conftest import RunRanks
from tests.training.teller import Teller

OWN = Process(0, 1, torch.device("cpu"))


@pytest.fixture
def run(small_run: Run, tmp_path: Path) -> Run:
    """Five steps of 512 tokens after three short ones of 128."""
    text = tmp_path / "text"
    text.write_bytes(bytes(range(32, 127)) * 400)
    return replace(
        small_run,
        data=DataConfig(text=(str(text),), heldout=0.2, passkey=0.3),
        short=Short(steps=3, seqlen=128, global_batch=8, lr=3e-3),
        out=str(tmp_path / "out"),
    )


def begin(run: Run, folder: str = "two") -> Teller:
    """Train a run's short stage if it lacks, then its two stages; return what was told."""
    teller = Teller()
    world_size = torch.distributed.get_world_size()
    own = Process(torch.distributed.get_rank(), world_size, torch.device("cpu"))
    check_run(run, world_size)
    train_short(run, own, teller)
    data = open_data(run.data, run.seqlen, run.seed)
    sharing = Sharing(weights=run.short_checkpoint)
    train(run, build(run, own.device), data, run.stages, run.folder / folder, teller, sharing)
    return teller


@pytest.mark.usefixtures("one_rank")
def test_a_run_begins_from_the_short_stage(run: Run) -> None:
    """Fails if weights or optimiser are not those of the checkpoint, or it is trained twice."""
    first = begin(run)
    assert [len(first.losses[name]) for name in ("short", "lighthouse", "dense")] == [3, 3, 2]
    again = begin(run, "again")
    assert "short" not in again.losses and again.losses["dense"] == first.losses["dense"]
    # By hand: the same weights and optimiser, then the same steps.
    trainee = build(run, OWN.device)
    assert run.short_checkpoint is not None
    assert checkpoint.load(run.short_checkpoint, trainee.model, trainee.optimizer) == 3
    alone = Teller()
    whole = replace(run, short=Short())
    data = open_data(run.data, run.seqlen, run.seed)
    train(whole, trainee, data, run.stages, run.folder / "alone", alone)
    assert alone.losses["dense"] == first.losses["dense"]
    scratch = Teller()
    train(whole, build(run, OWN.device), data, run.stages, run.folder / "new", scratch)
    assert scratch.losses["lighthouse"] != first.losses["lighthouse"]


@pytest.mark.usefixtures("one_rank")
def test_a_cut_run_goes_on_without_the_short_stage(run: Run) -> None:
    """Fails if a run that has a checkpoint begins anew, or asks for the short stage's."""
    whole = begin(run)
    data = open_data(run.data, run.seqlen, run.seed)
    cut = replace(run, dense_steps=0)
    sharing = Sharing(weights=run.short_checkpoint)
    folder = run.folder / "cut"
    train(cut, build(run, OWN.device), data, cut.stages, folder, Teller(), sharing)
    shutil.rmtree(run.short_folder)
    rest = Teller()
    train(run, build(run, OWN.device), data, run.stages, folder, rest, sharing)
    assert rest.losses == {"dense": whole.losses["dense"]}


def losses_of(group: object, run: Run) -> list[float]:
    return [loss for losses in begin(run).losses.values() for loss in losses]


def test_ranks_share_the_short_stage(run_ranks: RunRanks, run: Run, one_rank: None) -> None:
    """Fails if two ranks of one sequence do not train what one does."""
    two = replace(run, cp=2, out=run.out + "2")
    one = losses_of(None, run)
    for found in run_ranks(2, losses_of, two):
        assert found == pytest.approx(one, rel=1e-4)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 1e-3}, r"optim\.lr: 0\.003 there, 0\.001 here"),
        ({"seqlen": 256}, "seqlen: 128 there, 256 here"),
    ],
    ids=["rate", "length"],
)
def test_another_short_stage_is_refused(run: Run, change: dict[str, Any], message: str) -> None:
    """Fails if a run takes the short stage of a run that had another one."""
    train_short(run, OWN, Teller())
    other = replace(run, short=replace(run.short, **change))
    with pytest.raises(ValueError, match=message):
        begin(other)


@pytest.mark.usefixtures("one_rank")
def test_a_run_of_another_short_stage_is_another_run(run: Run) -> None:
    """Fails if a checkpoint of a run without the short stage is gone on with."""
    data = open_data(run.data, run.seqlen, run.seed)
    scratch = replace(run, short=Short(), dense_steps=0)
    train(scratch, build(run, OWN.device), data, scratch.stages, run.folder / "two", Teller())
    with pytest.raises(ValueError, match=r"short\.steps: 0 there, 3 here"):
        begin(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, r"short\.steps=-1: must not be negative"),
        ({"global_batch": 0}, r"short\.global_batch=0: must be at least 1"),
        ({"lr": 0.0}, r"short\.lr=0\.0: must be positive"),
        ({"seqlen": 1024}, r"short\.seqlen=1024: must be at most seqlen=512 .*for example 512"),
        ({"seqlen": 129}, r"short\.seqlen=129: .*for example"),
        ({"global_batch": 3}, r"the short stage .*global_batch=3: must be a multiple of"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_named(run: Run, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_run(replace(run, short=replace(run.short, **change)), 2)


@pytest.fixture
def knobs(run: Run) -> Knobs:
    plain = replace(run, lighthouse_steps=0, dense_steps=0)
    flags = ("", "lighthouse.topk 16", "model.dense-layers", "optim.lr 1e-3")
    return Knobs(run=plain, split="1+1", seeds=(0,), knobs=flags, contexts=(64, 256))


@pytest.mark.usefixtures("one_rank")
def test_knobs_share_one_short_stage(knobs: Knobs) -> None:
    """Fails if a knob trains one of its own, or the page lacks what it was."""
    teller = Teller()
    knobs.check(1)
    turn_knobs(knobs, OWN, teller)
    assert {name: len(losses) for name, losses in teller.losses.items()} == {
        "short": 3,
        "lighthouse": 4,
        "dense": 4,
    }
    # Before its first step a knob that changes no weight's use has the base's loss.
    base, _, _, rate = teller.losses["lighthouse"]
    assert base == rate
    folder = knobs.run.folder
    (short,) = read_short([folder])
    assert short.found is not None and short.found.asked.contexts == (64,)
    assert short.result.columns["loss"] == pytest.approx(teller.losses["short"], rel=1e-5)
    page = knobs_page.write(knobs_results.read([folder]), folder, [short])
    text = page.read_text()
    assert "begun from a short stage: 3 dense steps of 8 x 128 tokens" in text
    assert "its seeds' agreement" not in text  # One seed agrees with nobody.
    assert "## Short stage" in text and "passkey at 64 |" in text
    assert json.loads(page.with_suffix(".json").read_text())["short"][0]["seed"] == 0


@pytest.mark.parametrize("flags", ["model.rope-theta 5e5", "optim.clip 2", "short.steps 4"])
def test_a_knob_of_the_short_stage_is_refused(knobs: Knobs, flags: str) -> None:
    """Fails if knobs that cannot share the short stage start."""
    assert not {"model", "optim", "short"} & MAY_CHANGE.keys()
    with pytest.raises(ValueError, match=r"changes \w+ of the short stage"):
        replace(knobs, knobs=("", flags)).check(1)


@pytest.mark.usefixtures("one_rank")
def test_others_wait_for_who_trains_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if two processes train it at once, or the one that waits does not say for whom."""
    run.short_folder.mkdir(parents=True)
    lock = FileLock(run.short_folder / "run.lock")
    lock.acquire()
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 2:
            lock.release()

    monkeypatch.setattr(short_stage.time, "sleep", sleep)
    teller = Teller()
    train_short(run, OWN, teller)
    assert len(waited) == 2 and teller.said.count("waits for the short stage: ") == 1
    assert len(teller.losses["short"]) == 3
