"""What is said of a measurement: of numbers that were made up, so that each word has one cause."""

from dataclasses import replace

import pytest

from lhcp.measure import PhaseReport, StepCost, Timing
from lhcp.measure.effort import LEAST, Effort, rounds, too_long
from lhcp.measure.table import phase_rows
from lhcp.measure.timings import half_width
from lhcp.measure.verdict import Step, judge

PHASE = PhaseReport(
    phase="both",
    real=Timing.of([10.68e-3]),
    compute=Timing.of([10.1e-3]),
    communication=Timing.of([2e-3]),
    single=Timing.of([20e-3]),
    waited=0.5e-3,
    bytes_per_rank=2_000_000,
    world_size=2,
    exposed_error=0.1e-3,
    overhead_error=0.04,
)


def test_the_sentence_has_share_error_step_and_cause() -> None:
    verdict = judge(PHASE, "the attention", step=Step(1.9, 58))
    assert verdict.sentence == (
        "The rotation costs 6.8% +- 4.0% of the attention on one device / 2; "
        "2.1% of your step of 1.9 s; messages bind."
    )
    assert "TORCH_NCCL_HIGH_PRIORITY" in verdict.change and verdict.change in str(verdict)
    assert verdict.seconds == pytest.approx(0.68e-3)


@pytest.mark.parametrize(
    ("change", "said", "binds"),
    [
        ({"overhead_error": 0.07}, "not distinguishable from 0: +6.8% +- 7.0% of", None),
        ({"host": 10e-3}, "; the host binds.", "host"),
        # As slow without messages: it is the code on W ranks, not what they send.
        ({"compute": Timing.of([10.6e-3])}, "the blocks bind", "blocks"),
        ({"exposed_error": 1e-3}, "the blocks bind", "blocks"),
        ({"real": Timing.of([9e-3])}, "costs nothing: -10.0%", None),
        ({"overhead_error": None}, "6.8% (too few repeats to say how sure)", "messages"),
        ({"single": None}, "costs 5.7% +- 1.0% of the attention without messages", "messages"),
        ({"world_size": 1}, "One rank: nothing rotates", None),
    ],
    ids=["noise", "host", "blocks", "hidden", "faster", "few", "alone", "one"],
)
def test_each_case_has_its_words(change: dict[str, object], said: str, binds: str | None) -> None:
    verdict = judge(replace(PHASE, **change), "the attention")  # type: ignore[arg-type]
    assert said in verdict.sentence and verdict.binds == binds
    assert bool(verdict.change) == (binds is not None)


def test_of_noise_the_most_that_it_may_be_is_said() -> None:
    noisy = replace(PHASE, overhead_error=0.1)
    assert "; at most 5.1% of your step of 1.9 s." in str(judge(noisy, "x", step=Step(1.9, 58)))
    assert "more than all of your step" in str(judge(PHASE, "x", step=Step(1e-3, 58)))
    with pytest.raises(ValueError, match=r"num_layers=0: must be positive"):
        Step(1.0, 0)


def cells(phase: PhaseReport) -> list[str]:
    """Overhead, exposed, overlap and contention as the table shows them."""
    head, row = phase_rows([phase])
    ends = [head.index(name) + len(name) for name in ("overhead", "exposed", "overlap")]
    ends.append(head.index("contention") + len("contention"))
    return [row[end - 9 : end].strip() for end in ends]


def test_figures_below_the_noise_are_blank() -> None:
    """Fails if an overlap of -300% of nothing is printed, or a figure above the noise is not."""
    assert cells(PHASE) == ["6.8%", "0.580", "71.0%", "0.080"]
    assert cells(replace(PHASE, overhead_error=0.07)) == ["", "0.580", "71.0%", "0.080"]
    assert cells(replace(PHASE, exposed_error=0.6e-3)) == ["6.8%", "", "", ""]
    short = replace(PHASE, communication=Timing.of([0.1e-3]))
    assert cells(short) == ["6.8%", "0.580", "", "0.080"]
    assert cells(replace(PHASE, exposed_error=None, single=None))[:2] == ["-", "0.580"]


def test_an_interval_is_not_told_of_two() -> None:
    assert half_width([1.0, 2.0]) is None
    assert half_width([1.0, 2.0, 5.0]) == 3.0
    many = [1.0, 2.0, 3.0, 4.0] * 4
    timing = Timing.of(many)
    assert half_width(many) == pytest.approx(1.57 * (timing.high - timing.low) / 4)


@pytest.mark.parametrize(
    ("budget", "spent", "first", "repeats", "phases", "kept"),
    [
        (30, 2, 1.0, 14, 3, False),
        (30, 2, 0.01, 20, 3, False),
        (30, 10, 5.0, 4, 1, False),
        (30, 25, 8.0, LEAST, 1, True),
    ],
    ids=["all", "most", "both", "over"],
)
def test_a_budget_is_spent(
    budget: float, spent: float, first: float, repeats: int, phases: int, kept: bool
) -> None:
    """Fails if a budget is left unused, or three repeats are not taken in any case."""
    found = rounds(Effort(budget), spent, first)
    assert (found.repeats, len(found.phases), found.keep_first) == (repeats, phases, kept)
    if not kept:
        assert spent + found.seconds <= budget
    assert rounds(Effort(budget, repeats=7), spent, first).repeats == 7


def test_what_a_budget_does_not_reach_for_is_said() -> None:
    """Fails if somebody waits for minutes who asked for seconds, and is not told before."""
    said = too_long(Effort(10), 2, 2.0, 4)
    assert "takes 2.0 s" in said and "about 26 s, more than the budget of 10 s" in said
    assert not too_long(Effort(30), 2, 2.0, 4) and not too_long(Effort(10, repeats=9), 2, 2.0, 4)
    assert str(rounds(Effort(30), 25, 8.0)).endswith("about 16 s, 11 s beyond the budget")
    assert "beyond" not in str(rounds(Effort(30), 2, 1.0))


def test_a_step_in_a_sentence() -> None:
    cost = StepCost(
        real=Timing.of([1.9]),
        silent=Timing.of([1.86]),
        error=0.01,
        repeats=5,
        num_layers=26,
        world_size=2,
    )
    assert str(cost) == "The rotation's messages cost 2.1% +- 0.5% of your step of 1.9 s."
    assert cost.seconds == pytest.approx(0.04)
    assert "not distinguishable from 0: 2.1% +- 2.6%" in str(replace(cost, error=0.05))
    assert "too few repeats" in str(replace(cost, error=None))
    assert "One rank" in str(replace(cost, world_size=1))
