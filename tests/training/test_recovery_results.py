"""What is made of a recovery's records: comparisons, bands, pages, and files that fit together."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from lhcp.training import recovery_page, recovery_results
from lhcp.training.experiments import RECOVERIES
from lhcp.training.history import EvalRecord, History, StepRecord
from lhcp.training.recovery_report import bands, compare, spread, training_seconds
from lhcp.training.recovery_results import ArmResult
from lhcp.training.selection_log import SelectionRecord


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


def test_selections_are_drawn_of_who_looked(two_files: list[Path], tmp_path: Path) -> None:
    """Fails if a page of layers that were diagnosed has no picture of it."""
    record = SelectionRecord(2, 0, "lighthouse", 1 / 3, 0.5, 0.0, None)
    history = History(selections=[record])
    run = RECOVERIES["recover_tiny"]().run
    (kept,) = ArmResult.of(run, "2+1", history, {}, {}).selections
    assert kept == asdict(record) | {"spread_q": 0.3333}
    results = [
        replace(result, selections=[kept] if result.arm == "4+4" else [])
        for result in recovery_results.merge(two_files)
    ]
    page = recovery_page.write(results, tmp_path / "page")
    (name,) = re.findall(r"\]\((.*_selection.png)\)", page.read_text())
    assert (page.parent / name).read_bytes().startswith(b"\x89PNG")


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
