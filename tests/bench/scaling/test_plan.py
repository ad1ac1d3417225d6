"""How GPUs are split, and what is said to bind: pure functions of the cost model."""

from dataclasses import replace

import pytest

from bench.scaling.layer import Question, binds
from bench.scaling.limits import limit
from bench.scaling.plan import options, parse, splits
from lhcp.cost.calibration import Host, Link
from lhcp.cost.choose import predict
from lhcp.cost.tables import B200
from tests.bench.commands import last_json

GRAPHS = B200.in_graphs()
M = 2**20


def test_splits_keep_to_the_batch_and_to_nodes() -> None:
    """Fails if more sequences are taken than a batch has, or strata that ranks cannot share."""
    assert list(splits(32, M, 4 * M)) == [(4, 8), (2, 16), (1, 32)]
    assert next(splits(32, M // 4, 4 * M)) == (16, 2)
    assert list(splits(256, M, 4 * M)) == [(4, 64)]
    assert list(splits(24, M // 8, 3 * M)) == [(24, 1), (12, 2), (6, 4), (3, 8)]


def test_options_have_room_and_are_sorted() -> None:
    """Fails if a split that does not fit in memory is offered, or not the fastest first."""
    asked = Question("lighthouse", M, 1, GRAPHS)
    found = options(asked, 32, 4 * M, room=180)
    assert [row["tokens_s"] for row in found] == sorted(
        (row["tokens_s"] for row in found), reverse=True
    )
    assert (found[0]["dp"], found[0]["cp"]) == (4, 8)
    for row in found:
        assert row["tokens_s"] == pytest.approx(row["dp"] * M / (30e-3 * row["ms"]))
    most = max(row["memory_gib"] for row in found)
    fewer = options(asked, 32, 4 * M, room=most)
    assert len(fewer) < len(found) and max(row["memory_gib"] for row in fewer) <= 0.9 * most


def test_what_binds() -> None:
    """Fails if the name is not of what is slow."""
    shape = Question("lighthouse", M, 32, GRAPHS).shape
    slow = Link(latency=0.0, bandwidth=1e9)
    late = Link(latency=1.0, bandwidth=1e30)
    for name, table in (
        ("NIC", replace(GRAPHS, outer=slow)),
        ("NVLink", replace(GRAPHS, inner=slow)),
        ("latency", replace(GRAPHS, inner=late, outer=late)),
        ("host", replace(GRAPHS, host=Host(call=1.0))),
    ):
        assert binds("hybrid", shape, table) == name
    free = Link(latency=0.0, bandwidth=1e30)
    quick = replace(GRAPHS, inner=free, outer=free)
    assert binds("hybrid", shape, quick) == "blocks"
    long = Question("dense", 4 * M, 8, quick).shape
    assert binds("p2p", long, quick) == "attention"


@pytest.mark.parametrize("rotation", ["p2p", "hierarchical", "hybrid", "hybrid_context_first"])
def test_no_prediction_beats_the_limit(rotation: str) -> None:
    """Fails if the limit counts more than is needed, or the model less than the limit."""
    asked = Question("lighthouse", M, 32, GRAPHS)
    found = limit(rotation, asked)
    predicted = 1e3 * predict(rotation, asked.shape, GRAPHS).real
    assert found["hidden_ms"] <= min(predicted, found["in_turn_ms"])
    for direction in ("forward", "backward"):
        phase = found[direction]
        assert phase["ms"]["NIC"] == pytest.approx(1e3 * phase["bytes"][0] / 40e9)


def test_tokens_of_a_step_follow_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if --gpus alone is refused, or a table of unknown memory is not refused at once."""
    command = ["plan", "--gpus", "32", "64", "256"]
    monkeypatch.setattr("sys.argv", command)
    assert parse().batch_tokens == [4 * M, 8 * M, 16 * M]
    for more in (["--batch-tokens", "1"], ["--calibrations", "mine.json"]):
        monkeypatch.setattr("sys.argv", command + more)
        with pytest.raises(SystemExit):
            parse()
    monkeypatch.setattr("sys.argv", [*command, "--calibrations", "mine.json", "--room-gib", "80"])
    assert parse().room_gib == 80


@pytest.mark.slow
def test_the_command() -> None:
    """Fails if a length or a number of GPUs is left out."""
    document = last_json("-m", "bench.scaling.plan", "--calibrations", "B200")
    rows = [record["best"] for record in document["records"]]
    assert len({(row["gpus"], row["mode"], row["seqlen"]) for row in rows}) == 2 * 2 * 5
