"""Recovery: the shared stage changes no bit, a cut run goes on, and the numbers are right."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lhcp.training import checkpoint, recovery_page, recovery_results
from lhcp.training.data import DataConfig, open_data
from lhcp.training.experiments import RECOVERIES
from lhcp.training.history import EvalRecord, History, StepRecord
from lhcp.training.loop import train
from lhcp.training.model import Decoder, num_parameters
from lhcp.training.parallel import attention_factory, build, whole_model
from lhcp.training.process import Process
from lhcp.training.recovery import Recovery, Split, recover_seed
from lhcp.training.recovery_report import bands, compare, spread, training_seconds
from lhcp.training.recovery_results import ArmResult
from lhcp.training.run import Run
from lhcp.training.stages import OptimConfig

RunRanks = Callable[..., list[Any]]
ROOT = Path(__file__).parents[2]


class Teller:
    """Counts steps and keeps what it is told; can stop at a step, as a crash would."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after, self.steps, self.said = stop_after, 0, ""

    def say(self, text: str) -> None:
        self.said += text + "\n"

    def on_start(self, done: int, folder: Path) -> None:
        pass

    def on_passed_over(self, said: str) -> None:
        self.say(said)

    def on_step(self, record: StepRecord, stages: Any) -> None:
        self.steps += 1
        if self.steps == self.stop_after:
            raise InterruptedError

    def on_eval(self, record: EvalRecord) -> None:
        pass


@pytest.fixture
def recovery(small_run: Run, tmp_path: Path) -> Recovery:
    """Two splits of five and six steps; the shorter stage ends inside the longer one."""
    text = tmp_path / "text"
    text.write_bytes(bytes(range(32, 127)) * 400)
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


@pytest.mark.usefixtures("one_rank")
def test_sharing_changes_no_bit(recovery: Recovery) -> None:
    """Fails if a split from the shared stage, or dense, is not the run that shares nothing."""
    assert same_as_alone(None, recovery, ("dense", "3+2", "2+4")) == [True] * 6


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
def test_a_cut_recovery_goes_on(recovery: Recovery, tmp_path: Path) -> None:
    """Fails if taking up again changes a record, or does again what was finished."""
    run = replace(recovery.run, checkpoint_every=1)
    recovery = replace(recovery, run=run)
    whole = do(replace(recovery, run=replace(run, out=str(tmp_path / "whole"))), Teller())
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


@pytest.mark.usefixtures("one_rank")
def test_results_alone_go_on(recovery: Recovery) -> None:
    """Fails if results without checkpoints, on another machine, are of no use, or all that is."""
    do(replace(recovery, splits=("3+3",)), Teller())
    shutil.rmtree(recovery.run.folder / "seed0")
    idle, teller = Teller(), Teller()
    do(replace(recovery, splits=("3+3",)), idle)
    assert idle.steps == 0
    # The stage is made again, because a split needs it; dense is not.
    do(replace(recovery, splits=("3+3", "2+4")), teller)
    assert teller.steps == 3 + 4


@pytest.mark.usefixtures("one_rank")
def test_more_splits_take_what_is_there(recovery: Recovery) -> None:
    """Fails if a further split does more than its own steps, and those that dense then lacks."""
    do(recovery, Teller())
    teller = Teller()
    results = do(replace(recovery, splits=("3+2", "2+4", "4+4")), teller)
    assert teller.steps == (8 - 6) + (4 - 3) + 4
    assert [sum(n for _, n in r.stages) for r in results.values()] == [8, 4, 5, 6, 8]


@pytest.mark.usefixtures("one_rank")
def test_a_switch_that_left_no_checkpoint_is_named(recovery: Recovery) -> None:
    do(recovery, Teller())
    with pytest.raises(ValueError, match=r"step-00000001: no whole checkpoint.*another --out"):
        do(replace(recovery, splits=("3+2", "1+5")), Teller())


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_batch": 2}, r"seed 0, dense, which is finished: .*global_batch: 4 there, 2 here"),
        ({"splits": ("3+1",)}, r"stages: \[\['dense', 6\]\] there, \[\['dense', 4\]\] here"),
    ],
    ids=["run", "steps"],
)
def test_other_results_are_refused(
    recovery: Recovery, change: dict[str, Any], message: str
) -> None:
    """Fails if a folder's finished arms stand for arms that they are not."""
    do(recovery, Teller())
    splits = change.pop("splits", recovery.splits)
    other = replace(recovery, run=replace(recovery.run, **change), splits=splits)
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


def made(arm: str, seed: int, stages: list[tuple[str, int]], evals: list[EvalRecord]) -> ArmResult:
    """A result by hand: a dense step takes 2 s, a lighthouse one 1 s, the first one 50 s more."""
    seconds = [1.0 if name == "lighthouse" else 2.0 for name, n in stages for _ in range(n)]
    seconds[0] += 50
    columns = {name: [3.0] * len(seconds) for name in recovery_results.COLUMNS}
    return ArmResult(
        recipe="made",
        seed=seed,
        arm=arm,
        stages=stages,
        columns=columns | {"seconds": seconds},
        evals=evals,
        changes=[],
        run={"global_batch": 1, "seqlen": 8, "model": "m", "lighthouse": "l", "optim": "o"},
        identity={"seed": seed, "stages": [], "data.files": "f", "dtype": "float32", "optim.lr": 1},
        about={"card": "a card", "world_size": 1},
    )


def of_seed(seed: int, shift: float) -> list[ArmResult]:
    """Dense falls from 4 by 0.25 a step to 2; the split jumps to 5 and falls to 1.5 + shift."""
    dense = [EvalRecord(n, "baseline", "dense", 4 - 0.25 * n) for n in (2, 4, 6, 8)]
    stage = [
        EvalRecord(4, "lighthouse", "lighthouse", 2.5),
        EvalRecord(4, "lighthouse", "dense", 5),
    ]
    tail = [EvalRecord(6, "dense", "dense", 2.5), EvalRecord(8, "dense", "dense", 1.5 + shift)]
    return [
        made("dense", seed, [("baseline", 8)], dense),
        made("lighthouse", seed, [("lighthouse", 4)], stage),
        made("4+4", seed, [("lighthouse", 4), ("dense", 4)], [*stage, *tail]),
    ]


@pytest.fixture
def two_files(tmp_path: Path) -> list[Path]:
    """Results of two seeds, of different days, one of them twice in places."""
    for folder, seed, shift in (("a", 0, 0.0), ("b", 1, 0.25), ("c", 1, 0.25)):
        for result in of_seed(seed, shift):
            recovery_results.add(tmp_path / folder / f"made_seed{seed}.jsonl", result)
    return recovery_results.find([tmp_path / name for name in "abc"])


def test_numbers_of_two_seeds(two_files: list[Path]) -> None:
    """Fails if a difference, a time, a mean or a band is not what the hand-made records say."""
    results = recovery_results.merge(two_files)
    assert [(r.seed, r.arm) for r in results] == [
        (seed, arm) for seed in (0, 1) for arm in ("dense", "lighthouse", "4+4")
    ]
    first, second = compare(results)
    assert (first.split, first.seed, second.seed) == ("4+4", 0, 1)
    # 4 steps of 1 s and 4 of 2 s; compiling counts as a step, and is told.
    assert (first.seconds, first.whole_seconds, first.dense_seconds) == (12, 62, 16)
    assert first.switch.jump == 2.5 and first.switch.recovered_at == 2
    assert (first.dense_final, first.dense_at_tokens, first.equal_tokens) == (2, 2, -0.5)
    # 12 s of dense are 6 steps.
    assert (first.dense_at_time, first.equal_time, second.equal_time) == (2.5, -1, -0.75)
    # From 2.5 at 8 s to 1.5 at 12 s.
    assert (first.reached, first.dense_reached, first.time_share) == (10, 16, 10 / 16)
    assert second.reached == pytest.approx(8 + 4 * 0.5 / 0.75)
    found = spread([c.equal_tokens for c in (first, second)])
    assert found is not None
    assert (found.mean, found.low, found.high, found.count) == (-0.375, -0.5, -0.25, 2)
    assert found.std == pytest.approx(0.25 / 2**0.5)
    band = bands(results)["4+4"]["dense"]
    assert (band.steps, band.seconds) == ((4, 6, 8), (4, 8, 12))
    assert (band.mean, band.low, band.high) == ((5, 2.5, 1.625), (5, 2.5, 1.5), (5, 2.5, 1.75))
    assert bands(results)["lighthouse"]["lighthouse"].mean == (2.5,)


def test_page_of_two_seeds(two_files: list[Path], tmp_path: Path) -> None:
    """Fails if the page does not show a number, or a picture or the JSON is missing."""
    page = recovery_page.write(recovery_results.merge(two_files), tmp_path / "page")
    text = page.read_text()
    for expected in (
        *("-0.375 (-0.500 to -0.250; std 0.177; n=2)", "+2.500", "12.0 / 16.0, 62.0"),
        *("10.0 / 16.0", "-0.875", "| 4+4 | 0: 1.500, 1: 1.750 | 1.625", "card: a card"),
    ):
        assert expected in text, expected
    pictures = re.findall(r"\]\((.*png)\)", text)
    assert len(pictures) == 2
    for name in pictures:
        assert (page.parent / name).read_bytes().startswith(b"\x89PNG")
    record = json.loads(page.with_suffix(".json").read_text())
    assert [c["equal_tokens"] for c in record["comparisons"]] == [-0.5, -0.25]


def test_cards_name_the_page() -> None:
    """Fails if pages of one day and different cards take one another's name."""
    cards = [("NVIDIA H200", 2), ("NVIDIA H200", 1), ("NVIDIA H100 80GB HBM3", 1), ("AMD EPYC", 1)]
    results = [
        replace(of_seed(0, 0.0)[0], about={"card": name, "world_size": ranks} | more)
        for name, ranks in cards
        for more in [{"cudnn": 91900} if "NVIDIA" in name else {}]
    ]
    assert recovery_page.cards(results) == ["cpu", "h100", "h200", "h200x2"]


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    """Fails if a loss never reached, a dense that ended, or a seed without dense is a number."""
    dense, stage, split = of_seed(0, 0.75)
    slow = replace(split, columns=split.columns | {"seconds": [3.0] * 8})
    (found,) = compare([dense, slow])
    assert found.reached is None and found.dense_at_time is None
    assert found.equal_time is None and found.time_share is None
    assert compare([stage, slow]) == []
    text = recovery_page.write([dense, slow], tmp_path).read_text()
    assert "not reached / 16.0" in text and "dense ended before" in text
    assert recovery_page.write([stage], tmp_path / "alone").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": [("baseline", 8)], "run": {}}, "other results of the same arm"),
        ({"seed": 2, "recipe": "b"}, "different experiments: recipe: made and b"),
        ({"seed": 2, "identity": {"optim.lr": 2}}, "different experiments: .*optim.lr: 1 and 2"),
        ({"arm": "1+7", "identity": {"data.files": "g"}}, "seed 0: .*different texts"),
    ],
    ids=["twice", "recipe", "rate", "text"],
)
def test_files_that_do_not_go_together(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """Fails if what cannot be compared is merged."""
    dense = of_seed(0, 0.0)[0]
    other = change | {"identity": dense.identity | change.get("identity", {})}
    recovery_results.add(tmp_path / "a.jsonl", dense)
    recovery_results.add(tmp_path / "b.jsonl", replace(dense, **other))
    with pytest.raises(ValueError, match=message):
        recovery_results.merge([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])


def test_a_line_that_is_no_result_is_named(tmp_path: Path) -> None:
    path = tmp_path / "made_seed0.jsonl"
    recovery_results.add(path, of_seed(0, 0.0)[0])
    path.write_text(path.read_text() + '{"recipe": "ma')
    with pytest.raises(ValueError, match=r"made_seed0.jsonl:2: no line .*remove the line"):
        recovery_results.read(path)


def test_only_slow_steps_count_as_the_usual_one() -> None:
    """Fails if compiling counts as training, or a step just slower than others does not."""
    result = made("1+5", 0, [("lighthouse", 1), ("dense", 5)], [])
    seconds = [51.0, 2.0, 6.1, 2.0, 5.9, 2.0]
    clock = training_seconds(replace(result, columns=result.columns | {"seconds": seconds}))
    # Alone in its stage, the first step is the usual one.
    assert clock == pytest.approx([51, 53, 55, 57, 62.9, 64.9])


SHORT = [
    *("--eval-every", "4", "--checkpoint-every", "3", "--eval-sequences", "2"),
    *("--seqlen", "256", "--lighthouse.topk", "8"),
]


def command(*arguments: str, ranks: int = 0) -> list[str]:
    """Return the command of launch/recover.py, under torchrun with `ranks` ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    program = [*(torchrun if ranks else []), "launch/recover.py", "recover_tiny"]
    return [sys.executable, *program, *arguments, *SHORT]


def launch(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240
    )


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_from_the_command_line_to_the_page(tmp_path: Path) -> None:
    """Fails if the program, killed and taken up again, does not end in the picture of all seeds.

    Seed 0 comes from a plain process that is killed, seed 1 from two ranks in another folder.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    (tmp_path / "text").write_bytes(bytes(range(32, 127)) * 400)
    same = ("--splits", "6+6", "9+3", "--data.text", str(tmp_path / "text"))
    first = command("--seeds", "0", *same, "--out", str(one))
    # In a session of its own: a stopped process must not stop, or end, the group of the tests.
    killed = subprocess.Popen(
        first,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert killed.stdout is not None
        for line in killed.stdout:
            if line.startswith("lighthouse     6  held-out"):
                break
        killed.send_signal(signal.SIGSTOP)
        refused = launch(first)
    finally:
        killed.kill()
        killed.wait()
    assert refused.returncode == 1 and f"in use by another run (process {killed.pid}" in (
        refused.stderr
    )
    again = launch(first)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "seed 0, dense: done before" in again.stdout
    assert "lighthouse     2/9" not in again.stdout

    seeds = command(
        *("--seeds", "1", *same, "--cp", "2", "--no-page", "--out", str(two)),
        ranks=2,
    )
    done = launch(seeds)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(p.name for p in two.iterdir()) == ["recover_tiny_seed1.jsonl", "seed1"]
    page = tmp_path / "page"
    program = [sys.executable, "launch/recover_page.py"]
    merged = launch([*program, str(one), str(two), "--page", str(page)])
    assert merged.returncode == 0, merged.stdout + merged.stderr
    assert "- seeds: 0, 1;" in merged.stdout and "n=2)" in merged.stdout
    for folder, cards in ((one, "cpu"), (page, "cpu_cpux2")):
        assert {p.suffix for p in folder.glob(f"recover_tiny_{cards}_20*")} == {
            ".md",
            ".json",
            ".png",
        }
    assert merged.stdout.splitlines()[-1].startswith(f"page: {page}/recover_tiny_")


def test_a_place_without_results_is_named(tmp_path: Path) -> None:
    """Fails if a wrong folder is merged as one without seeds."""
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"no results of recover\.py"):
            recovery_results.find([place])


def test_a_history_is_stored_with_six_digits() -> None:
    """Fails if a result loses a step, or its file is of full precision."""
    records = [
        StepRecord(n, stage, 1 / 3, 2 / 3, 1e-3, 1e-7 / 3, 1.0, 0.0)
        for n, stage in ((1, "lighthouse"), (2, "lighthouse"), (3, "dense"))
    ]
    history = History(records, [EvalRecord(3, "dense", "dense", 2 / 3)])
    run = RECOVERIES["recover_tiny"]().run
    result = ArmResult.of(run, "2+1", history, {}, {})
    assert result.stages == [("lighthouse", 2), ("dense", 1)]
    assert result.columns["loss"] == [0.333333] * 3
    assert result.columns["seconds"] == [3.33333e-08] * 3
    assert result.evals[0].loss == 0.666667
    assert ArmResult.from_json(json.loads(json.dumps(asdict(result)))) == replace(
        result, run=json.loads(json.dumps(result.run))
    )
