"""The passkey test of a model: what is counted, on one rank and on two, and from which folder."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lhcp.training import checkpoint, retrieval, retrieval_report
from lhcp.training.data import DataConfig, open_data
from lhcp.training.experiments import RECOVERIES
from lhcp.training.identity import accepted_changes, identity
from lhcp.training.parallel import Trainee, build
from lhcp.training.passkey import DIGITS
from lhcp.training.retrieval import Asked, Found, retrieve
from lhcp.training.run import Run
from lhcp.training.trained import find_checkpoint, trained_run

RunRanks = Callable[..., list[Any]]
ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def run(small_run: Run, tmp_path: Path) -> Run:
    text = tmp_path / "text"
    text.write_bytes(bytes(range(32, 127)) * 400)
    return replace(small_run, data=DataConfig(text=(str(text),), heldout=0.2, passkey=0.5))


def save(run: Run, folder: Path, step: int = 3) -> Path:
    """Write a checkpoint of the untrained model, as training does."""
    trainee = build(run, CPU)
    manifest = open_data(run.data, run.seqlen, run.seed).manifest
    beside = {"identity": identity(run, run.stages, manifest, torch.float32, step)}
    return checkpoint.save(folder, step, trainee.model, trainee.optimizer, beside=beside, keep=5)


class Reader(torch.nn.Module):
    """Finds the digit by looking: the logits of the last position name the byte after the mark."""

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, 256)
        for row, text in enumerate(tokens.tolist()):
            key = bytes(text).index(b"\n#") + 2
            logits[row, -1, text[key]] = 1
            # What is no digit does not count, and neither does another position.
            logits[row, -1, 65] = 9
            logits[row, 0, DIGITS[0]] = 99
        return logits


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("batch", [1, 3, 20])
def test_a_model_that_reads_is_always_right(run: Run, batch: int) -> None:
    """Fails if another position, a byte that is no digit, or another batch counts."""
    trainee = build(run, CPU)
    reads = Trainee(Reader(), trainee.sharded, *list(vars(trainee).values())[2:])  # type: ignore[arg-type]
    asked = Asked(contexts=(64,), batch=batch)
    assert [retrieval.ask(reads, run, asked, 64, depth) for depth in asked.depths] == [1.0] * 11


@pytest.mark.usefixtures("one_rank")
def test_a_checkpoint_says_all_of_its_model(run: Run, tmp_path: Path) -> None:
    """Fails if a size of the model or of its selection is not what was trained."""
    path = save(run, tmp_path / "arm")
    found, done, stages = trained_run(path, 1)
    assert (found.model, found.lighthouse, found.optim) == (run.model, run.lighthouse, run.optim)
    assert (found.seqlen, found.seed, found.dtype, done) == (run.seqlen, run.seed, "fp32", 3)
    assert stages == [("lighthouse", 3)]


@pytest.mark.usefixtures("one_rank")
def test_weights_are_those_of_the_checkpoint(run: Run, tmp_path: Path) -> None:
    """Fails if a fresh model is asked instead, or lighthouse mode is not the one asked in."""
    for seed in (0, 1):
        save(replace(run, seed=seed), tmp_path / str(seed))
    asked = Asked(contexts=(256, 512), depths=(0.0, 0.5), trials=8, batch=4)
    zero, one = (retrieve(tmp_path / str(seed), asked, CPU) for seed in (0, 1))
    assert zero.accuracy == retrieve(tmp_path / "0", asked, CPU).accuracy
    sparse = retrieve(tmp_path / "0", replace(asked, mode="lighthouse"), CPU)
    trainee = build(replace(run, dense_steps=0), CPU)
    straight = [
        [retrieval.ask(trainee, run, asked, context, depth) for depth in asked.depths]
        for context in asked.contexts
    ]
    # As built, the layers attend in lighthouse mode.
    assert sparse.accuracy == straight
    assert len(zero.accuracy) == 2 and len(zero.accuracy[0]) == 2 and one.step == 3


def on_ranks(group: object, run: Run, folder: Path, asked: Asked) -> list[list[float]]:
    return retrieve(folder, asked, CPU).accuracy


@pytest.mark.parametrize("mode", ["dense", "lighthouse"])
def test_two_ranks_find_what_one_finds(
    run_ranks: RunRanks, run: Run, tmp_path: Path, mode: Any
) -> None:
    """Fails if the last position is not taken from the rank that has it."""
    run_ranks(1, save_on, run, tmp_path / "arm")
    asked = Asked(contexts=(256,), depths=(0.0, 0.5, 1.0), trials=12, batch=12, mode=mode)
    (one,) = run_ranks(1, on_ranks, run, tmp_path / "arm", asked)
    assert run_ranks(2, on_ranks, run, tmp_path / "arm", asked) == [one] * 2


def save_on(group: object, run: Run, folder: Path) -> None:
    save(run, folder)


@pytest.mark.usefixtures("one_rank")
def test_the_newest_whole_checkpoint_is_taken(run: Run, tmp_path: Path) -> None:
    """Fails if a damaged checkpoint, or an older one, is asked; or the hint misses an arm."""
    arm = tmp_path / "run" / "arm"
    paths = [save(run, arm, step) for step in (2, 3, 4)]
    next(paths[2].glob("*.distcp")).unlink()
    assert find_checkpoint(arm) == paths[1] and find_checkpoint(paths[0]) == paths[0]
    with pytest.raises(FileNotFoundError, match=rf"no whole checkpoint.*name one of {arm}"):
        find_checkpoint(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="is it a folder of --out"):
        find_checkpoint(tmp_path / "nowhere")


def test_an_old_checkpoint_is_named(tmp_path: Path) -> None:
    record = {"step": 1, "files": {}, "beside": {}}
    (tmp_path / "complete.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"identity lacks seqlen.*older version"):
        trained_run(tmp_path, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contexts": ()}, "contexts=.*at least one"),
        ({"contexts": (64, 64)}, "none of them twice"),
        ({"contexts": (8,)}, "must have at least 18"),
        ({"depths": (0.5, 2.0)}, r"depths=.*\[2.0\] are outside 0 to 1"),
        ({"trials": 0}, "trials=0: must be at least 1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_questions_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Asked(**{"contexts": (64,)} | change)


@pytest.mark.parametrize(
    ("asked", "cp", "message"),
    [
        (Asked(contexts=(1024,)), 1, "1024 is longer than the 512 tokens"),
        (Asked(contexts=(66,)), 2, "seqlen=66: .*zigzag"),
        (Asked(contexts=(100,), mode="lighthouse"), 1, "seqlen=100"),
    ],
    ids=["long", "ranks", "lighthouse"],
)
def test_contexts_that_do_not_fit_are_named(run: Run, asked: Asked, cp: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        asked.check(replace(run, cp=cp))


def found(name: str, accuracy: list[list[float]]) -> Found:
    asked = Asked(contexts=(64, 128), depths=(0.0, 0.5, 1.0), trials=4)
    return Found(
        name=name,
        step=5,
        stages=[("lighthouse", 3), ("dense", 2)],
        asked=asked,
        accuracy=accuracy,
        run={},
    )


def test_table_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a cell, a mean or a model is lost on the way to a reader."""
    models = [found("a", [[1, 0.5, 0], [0.25, 1, 1]]), found("b", [[0, 0, 0], [0, 0, 0]])]
    picture = retrieval_report.write(models, tmp_path, {"card": "a card"})
    assert picture.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "a: 3 lighthouse + 2 dense steps, asked in dense mode" in said
    rows = [line.split() for line in said.splitlines()]
    assert ["64", "1.00", "0.50", "0.00", "0.500"] in rows
    assert "mean 0.625 of 24 questions; chance 0.1" in said
    record = json.loads((tmp_path / "retrieval.json").read_text())
    assert [x["mean"] for x in record["found"]] == [0.625, 0] and record["about"]["card"]


@pytest.mark.usefixtures("one_rank")
def test_the_share_is_part_of_what_a_run_is(run: Run) -> None:
    """Fails if a run goes on with another mix unasked, or one of before cannot go on."""
    manifest = open_data(run.data, run.seqlen, 0).manifest
    plain = replace(run, data=replace(run.data, passkey=0.0))
    mixed, old = (identity(r, r.stages, manifest, torch.float32, 2) for r in (run, plain))
    for before, now in ((mixed, old), (old, mixed)):
        with pytest.raises(ValueError, match=r"data.passkey.*--accept data.passkey"):
            accepted_changes(before, now, (), 2, details="")
        (change,) = accepted_changes(before, now, ("data.passkey",), 2, details="")
        assert change.name == "data.passkey"
    without = {name: value for name, value in old.items() if name != "data.passkey"}
    assert accepted_changes(without, old, (), 2, details="") == []


@pytest.mark.parametrize("name", ["retrieve_32k", "retrieve_16k"])
def test_recipes_train_on_what_they_are_asked(name: str) -> None:
    """Fails if a recipe for this test has no passkey text, or another k than N / 32."""
    run = RECOVERIES[name]().run
    assert run.data.passkey > 0 and run.lighthouse.topk * 32 == run.seqlen
    Asked(contexts=(run.seqlen // 8, run.seqlen)).check(run)
    Asked(contexts=(run.seqlen,), mode="lighthouse").check(run)


@pytest.mark.usefixtures("one_rank")
def test_from_the_command_line(tmp_path: Path, run: Run) -> None:
    """Fails if the command in the program's help does not end in the picture."""
    save(run, tmp_path / "arm")
    folder = str(tmp_path / "arm")
    asked = subprocess.run(
        [sys.executable, "launch/retrieve.py", folder, "--contexts", "64", "128", "--trials", "2"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.splitlines()[-1] == f"picture: {folder}/retrieval.png"
    assert "of 44 questions; chance 0.1" in asked.stdout
