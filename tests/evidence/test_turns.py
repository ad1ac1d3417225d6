"""What turns find of a difference that is known, beside drift and steps that were held up."""

import statistics
from contextlib import nullcontext

import pytest

from tests.evidence.turns import Arm, Turns, take_turns


def turns_of(more: float, held_up: int = 0, rounds: int = 10, block: int = 4) -> Turns:
    """Take turns at steps of 100 ms and `more` with it, which all become longer by and by."""
    done = {"without": 0, "with": 0, "all": 0}

    def step(arm: Arm) -> float:
        done[arm] += 1
        done["all"] += 1
        seconds = 0.1 * (1 + (more if arm == "with" else 0.0)) + 1e-5 * done["all"]
        slow = (
            arm == "with" and done[arm] % (block + 1) == 0 and done[arm] // (block + 1) <= held_up
        )
        return seconds + (0.2 if slow else 0.0)

    return take_turns(step, {"without": nullcontext, "with": nullcontext}, rounds, block)


def test_a_difference_is_found_in_spite_of_a_drift() -> None:
    """Fails if arms are not paired, or their order does not alternate."""
    turns = turns_of(0.002)
    assert len(turns.seconds["with"]) == len(turns.seconds["without"]) == 40
    for of in (statistics.median, statistics.mean):
        more, error = turns.difference(of)
        assert more == pytest.approx(0.002, abs=2e-4) and 0 < error < 5e-3
    assert turns.slow("with") == turns.slow("without") == (0, 0)


def test_steps_that_are_held_up_count_in_the_mean_and_are_counted() -> None:
    """Fails if what a median hides shows nowhere."""
    turns = turns_of(0.0, held_up=2)
    by_median, by_mean = (turns.difference(of)[0] for of in (statistics.median, statistics.mean))
    assert abs(by_median) < 1e-3 and by_mean == pytest.approx(2 * 0.2 / 4 / 0.1 / 10, rel=0.05)
    assert turns.slow("with") == (2, 0) and turns.slow("without") == (0, 0)
