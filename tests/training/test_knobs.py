"""Knobs: flags become runs, nothing is done twice, and the page's numbers are right."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from lhcp.training import knobs_page, knobs_results, recovery_results, retrieval_report
from lhcp.training.data import DataConfig
from lhcp.training.experiments import KNOBS
from lhcp.training.history import EvalRecord
from lhcp.training.knobs import Knobs, answers_of, read_answers, turn_knobs
from lhcp.training.knobs_results import Row
from lhcp.training.process import Process
from lhcp.training.recovery_results import ArmResult
from lhcp.training.retrieval import Asked, Found
from lhcp.training.run import Run
from tests.training.teller import Teller

OWN = Process(0, 1, torch.device("cpu"))


@pytest.fixture
def knobs(small_run: Run, tmp_path: Path) -> Knobs:
    """The base and two knobs of four steps."""
    text = tmp_path / "text"
    text.write_bytes(bytes(range(32, 127)) * 400)
    run = replace(
        small_run,
        data=DataConfig(text=(str(text),), heldout=0.2),
        lighthouse_steps=0,
        dense_steps=0,
        out=str(tmp_path / "out"),
    )
    flags = ("", "lighthouse.topk 16", "model.dense-layers")
    return Knobs(run=run, split="2+2", seeds=(0,), knobs=flags, contexts=(64,))


@pytest.mark.parametrize("name", KNOBS)
def test_recipe_fits(name: str) -> None:
    knobs = KNOBS[name]()
    knobs.check(1)
    assert knobs.run.name == name and KNOBS[name].__doc__


def test_flags_become_runs(knobs: Knobs) -> None:
    """Fails if a knob changes more than its flags say, or two share a folder."""
    both = replace(knobs, knobs=(*knobs.knobs, "lighthouse.topk 16, optim.lr 1e-2"))
    base, fewer, none, two = [k.recovery.run for k in both.turned]
    folder = knobs.run.folder
    short = replace(knobs.run.short, out=str(folder))
    assert base == replace(knobs.run, short=short, out=str(folder / "base"))
    assert fewer.lighthouse == replace(knobs.run.lighthouse, topk=16)
    assert fewer.folder == folder / "lighthouse.topk-16" and fewer.model == base.model
    assert none.model.dense_layers == () and two.optim.lr == 1e-2 and two.lighthouse.topk == 16
    assert [k.recovery.part for k in both.turned] == ["splits"] * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"knobs": ("", "lighthouse.top 16")}, r"knobs: 'lighthouse.top 16': must be flags"),
        ({"knobs": ("", "")}, "none of them twice"),
        ({"knobs": ()}, "at least one"),
        ({"knobs": ("lighthouse.topk 512",)}, "seqlen=512: each stratum has"),
        ({"contexts": (1024,)}, "1024 is longer than the 512 tokens"),
        ({"split": "2-2"}, "splits: '2-2'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_knobs_are_named(knobs: Knobs, change: dict[str, Any], message: str) -> None:
    """Fails if an experiment that cannot be done starts."""
    with pytest.raises(ValueError, match=message):
        replace(knobs, **change).check(1)


@pytest.mark.usefixtures("one_rank")
def test_each_knob_is_done_once(knobs: Knobs) -> None:
    """Fails if what another process holds, or has done, is done here, or an answer is lost."""
    held = knobs.turned[1].recovery.run
    (held.folder / "seed0").mkdir(parents=True)
    with FileLock(held.folder / "seed0" / "run.lock"):
        first = Teller()
        turn_knobs(knobs, OWN, first)
    assert first.steps == 2 * 4 and first.said.count("passed over: ") == 1
    assert not answers_of(held, 0).exists()
    second, third = Teller(), Teller()
    turn_knobs(knobs, OWN, second)
    turn_knobs(knobs, OWN, third)
    assert (second.steps, third.steps) == (4, 0)
    rows = knobs_results.read([knobs.run.folder])
    assert list(rows) == ["base", "lighthouse.topk-16", "model.dense-layers"]
    found = read_answers(held.folder)[0]
    assert found.asked == knobs.asked and found == Found.from_json(
        json.loads(json.dumps(found.to_json()))
    )
    page = knobs_page.write(rows, knobs.run.folder)
    assert "| topk=16 |" in page.read_text() and "| dense_layers=[] |" in page.read_text()


def made(seed: int, topk: int, final: float, fall: float) -> ArmResult:
    """A split of 10 + 10 steps: 1 s and 2 s; the last two training losses are lower by `fall`."""
    evals = [
        EvalRecord(10, "lighthouse", "lighthouse", 2.0),
        EvalRecord(10, "lighthouse", "dense", 3.5),
        EvalRecord(20, "dense", "dense", final),
    ]
    lighthouse = {"num_levels": 2, "pool_factor": 2, "topk": topk, "num_strata": 1}
    run = {"global_batch": 1, "seqlen": 64, "model": "m", "lighthouse": lighthouse, "optim": "o"}
    own = {"seed": seed, "stages": [], "data.files": "f", "dtype": "float32"}
    return ArmResult(
        recipe="made",
        seed=seed,
        arm="10+10",
        stages=[("lighthouse", 10), ("dense", 10)],
        columns={
            "loss": [3.0] * 18 + [3.0 - fall] * 2,
            "grad_norm": [1.0] * 20,
            "seconds": [1.0] * 10 + [2.0] * 10,
        },
        evals=evals,
        changes=[],
        run=run,
        identity=own | {"lighthouse.topk": topk},
        about={"card": "a card", "world_size": 1},
    )


def test_numbers_of_two_knobs(tmp_path: Path) -> None:
    """Fails if a difference takes another seed's base, or a number is not what was made."""
    for name, results in (
        ("base", [made(0, 4, 1.0, 0.0), made(1, 4, 1.5, 0.0)]),
        ("topk-8", [made(1, 8, 1.25, 0.5)]),
    ):
        for result in results:
            path = tmp_path / name / f"made_seed{result.seed}.jsonl"
            recovery_results.add(path, result)
            recovery_results.add(path, replace(result, arm="lighthouse"))
    rows = knobs_results.read([tmp_path])
    base, more = rows["base"], rows["topk-8"]
    assert knobs_results.label(base, base) == "base" and knobs_results.label(more, base) == "topk=8"
    assert knobs_results.differences(more, base) == [-0.25]
    assert knobs_page.cells(more, base) == [
        *("topk=8", "48", "1: 1.250", "-0.250", "2.000", "3.500", "-0.500"),
        *("1.0000 / 2.0000", "30", "-"),
    ]
    page = knobs_page.write(rows, tmp_path / "page")
    assert "0: 1.000, 1: 1.500" in page.read_text()
    assert "Seeds of the base lie 0.500 apart" in page.read_text()
    pictures = re.findall(r"\]\((.*png)\)", page.read_text())
    assert len(pictures) == 2
    for picture in pictures:
        assert (page.parent / picture).read_bytes().startswith(b"\x89PNG")
    record = json.loads(page.with_suffix(".json").read_text())
    assert [s["less_base"] for s in record["knobs"]] == [[0.0, 0.0], [-0.25]]


def test_a_difference_is_shown_by_seed() -> None:
    """Fails if two seeds that disagree look like one number, or a shared start is not told of."""
    assert knobs_page.less_base([]) == "-" and knobs_page.less_base([-0.25]) == "-0.250"
    assert knobs_page.less_base([-0.25, 0.75]) == "+0.250 (-0.250, +0.750)"
    results = {seed: made(seed, 4, 1.0 + seed, 0.0) for seed in (0, 1)}
    assert "lie 1.000 apart: smaller" in knobs_page.noise(Row(results, {}))
    begun = {s: replace(r, run=r.run | {"short": {"steps": 3}}) for s, r in results.items()}
    assert "lie 1.000 apart, by their short" in knobs_page.noise(Row(begun, {}))


def test_answers_are_shown_by_seed() -> None:
    """Fails if a map or a row mixes seeds, or is named after a folder of its machine."""
    asked = Asked(contexts=(64, 128), depths=(0.0, 1.0))
    found = {
        seed: Found(
            name="/there", step=1, stages=[("dense", 1)], asked=asked, accuracy=cells, run={}
        )
        for seed, cells in ((0, [[0.0, 1.0], [0.0, 0.0]]), (1, [[1.0, 1.0]] * 2))
    }
    results = {seed: made(seed, 8, 1.0, 0.0) for seed in (0, 1)}
    rows = {"base": Row({0: made(0, 4, 1.0, 0.0)}, {0: found[0]}), "topk-8": Row(results, found)}
    assert [one.name for one in knobs_page.models(rows, 0)] == ["base, seed 0", "topk=8, seed 0"]
    assert knobs_page.models(rows, 1) == [replace(found[1], name="topk=8, seed 1")]
    text = knobs_page.markdown(rows, ())
    assert "| topk=8 | 0 | 0.500 | 0.000 |" in text and "| topk=8 | 1 | 1.000 | 1.000 |" in text


def test_a_place_without_a_base_is_named(tmp_path: Path) -> None:
    """Fails if knobs are compared with nothing."""
    with pytest.raises(FileNotFoundError, match=r"no results of knobs\.py"):
        knobs_results.read([tmp_path])
    recovery_results.add(tmp_path / "other" / "made_seed0.jsonl", made(0, 8, 1.0, 0.0))
    with pytest.raises(FileNotFoundError, match="no finished split of the run without a change"):
        knobs_results.read([tmp_path])


def test_many_maps_stand_in_lines(tmp_path: Path) -> None:
    """Fails if a model of many has no map."""
    asked = Asked(contexts=(64, 128), depths=(0.0, 1.0))
    one = Found(
        name="m", step=1, stages=[("dense", 1)], asked=asked, accuracy=[[0.0, 1.0]] * 2, run={}
    )
    sizes = []
    for count in (4, 5):
        retrieval_report.draw([one] * count, tmp_path / "maps.png")
        sizes.append(int.from_bytes((tmp_path / "maps.png").read_bytes()[20:24], "big"))
    assert sizes[1] == 2 * sizes[0]
