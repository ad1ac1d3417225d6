"""The switch of a history that is made by hand."""

from lhcp.training.history import EvalRecord, History, StepRecord
from lhcp.training.switch import find_switch


def steps(stage: str, first: int, speed: float) -> list[StepRecord]:
    return [StepRecord(i, stage, 3.0, 1.0, 1e-3, 0.5, speed, 0.1) for i in range(first, first + 5)]


def two_stages() -> History:
    return History(
        steps("lighthouse", 1, 200.0) + steps("dense", 6, 100.0),
        [
            EvalRecord(5, "lighthouse", "lighthouse", 2.0),
            EvalRecord(5, "lighthouse", "dense", 3.0),
            EvalRecord(7, "dense", "dense", 2.5),
            EvalRecord(9, "dense", "dense", 1.9),
            EvalRecord(10, "dense", "dense", 1.75),
        ],
    )


def test_switch() -> None:
    switch = find_switch(two_stages())
    assert switch is not None
    assert (switch.step, switch.jump, switch.recovered, switch.recovered_at) == (5, 1.0, 1.25, 4)


def test_no_switch_without_a_dense_stage() -> None:
    history = two_stages()
    history.evals = history.evals[:2]
    assert find_switch(history) is None
