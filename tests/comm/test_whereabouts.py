"""What is said of ranks, from what they posted: without ranks."""

from dataclasses import replace

import pytest

from lhcp.comm.whereabouts import (
    Heard,
    Place,
    Whereabouts,
    excused,
    guilty,
    in_words,
    ranks_in_words,
)

INF = float("inf")


def at(number: int, phase: str, step: int = 6, limit: float = 120.0) -> Place:
    return Place(number, phase, step, limit)


def heard(rank: int, place: Place, silent: float = 0.0, **more: object) -> Heard:
    where = replace(Whereabouts(place), **more)  # type: ignore[arg-type]
    return Heard(rank, where, silent, silent > 2)


WAITS = at(12, "backward")


def test_a_rank_that_is_gone_is_named_before_those_that_wait() -> None:
    ranks = [heard(rank, WAITS, 41.3 if rank == 1 else 0.5) for rank in range(4)]
    assert in_words(ranks) == (
        "rank 1 was last heard in step 6, backward, 41 s ago: it has stopped, or its process is "
        "gone; ranks 0, 2 and 3 wait in step 6, backward"
    )
    assert guilty(ranks) and not guilty(ranks[2:])


def test_who_never_came_who_failed_and_who_left() -> None:
    ranks = [
        Heard(0, None, 9.0, True),
        heard(1, at(11, "forward"), end="failed", said="ValueError: x"),
        heard(2, at(13, "save"), end="left"),
        heard(3, WAITS, 60.0, end="cut off", said="RuntimeError: closed"),
    ]
    assert in_words(ranks) == (
        "rank 0 was never heard of; rank 1 ended in step 6, forward: ValueError: x; rank 2 was "
        "done after step 6, save, and left; rank 3 waits in step 6, backward"
    )


def test_a_rank_behind_that_lives_is_said_to_live() -> None:
    ranks = [heard(0, WAITS), heard(1, at(11, "forward"), still=121.0), heard(2, WAITS)]
    assert in_words(ranks) == (
        "rank 1 is alive and has not moved from step 6, forward for 121 s; ranks 0 and 2 wait in "
        "step 6, backward"
    )


def test_errors_of_ranks_that_all_failed_are_said_once_each() -> None:
    ranks = [heard(r, WAITS, end="cut off", said="A" if r else "B") for r in range(3)]
    assert in_words(ranks) == (
        "ranks 0, 1 and 2 wait in step 6, backward; rank 0 failed with B; ranks 1 and 2 failed "
        "with A"
    )


def test_calls_that_differ_are_said_by_what_differs() -> None:
    asked = {"q": "[1, 8]", "scale": "0.1"}
    ranks = [
        heard(0, WAITS, calls=5, trail=7, asked=asked),
        heard(1, WAITS, calls=6, trail=9, asked=asked | {"scale": "0.3"}),
    ]
    assert in_words(ranks).endswith(
        "the ranks' attention calls differ: rank 0 is at attention call 5 (scale: 0.1), rank 1 is "
        "at attention call 6 (scale: 0.3)"
    )


@pytest.mark.parametrize(
    ("other", "waits"),
    [
        (heard(1, at(11, "save", limit=480.0), 0.5, still=100.0), True),
        (heard(1, at(11, "save", limit=480.0), 0.5, still=480.0), False),
        (heard(1, at(11, "save", limit=480.0), 121.0, still=1.0), False),
        (heard(1, at(12, "backward", limit=480.0), 0.5), False),
        (heard(1, at(11, "save", limit=480.0), 0.5, end="left"), False),
        (Heard(1, None, 0.5, False), False),
    ],
    ids=["busy", "too long", "silent", "not behind", "done", "never came"],
)
def test_only_a_rank_that_is_rightly_busy_before_it_is_waited_for(
    other: Heard, waits: bool
) -> None:
    """Fails if a save is not waited for, or anything else is, for ever."""
    assert excused(WAITS, [other], patience=120.0) is waits


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([1], "rank 1"),
        ([0, 2], "ranks 0 and 2"),
        ([3, 0, 2], "ranks 0, 2 and 3"),
        ([*range(7), *range(8, 64)], "ranks 0-6 and 8-63"),
        ([*range(64)], "ranks 0-63"),
    ],
)
def test_many_ranks_are_said_in_runs(ranks: list[int], words: str) -> None:
    assert ranks_in_words(ranks) == words


def test_what_is_posted_comes_back() -> None:
    one = Whereabouts(at(3, "forward"), 5, 6, 7, 0.5, "failed", "E", {"q": "1"})
    assert Whereabouts.from_json(one.to_json()) == one
    start = Whereabouts()
    assert Whereabouts.from_json(start.to_json()) == start and start.place.limit == INF
