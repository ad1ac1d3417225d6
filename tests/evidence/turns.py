"""Steps with and without something, timed in turns: the difference, and how sure it is."""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Literal

Arm = Literal["without", "with"]
SLOW = 1.5
"""Times the median that a step takes which counts as slow."""


@dataclass
class Turns:
    """Seconds of steps, by arm, in blocks that follow one another in pairs."""

    block: int
    """Steps of one."""
    seconds: dict[Arm, list[float]] = field(default_factory=lambda: {"without": [], "with": []})
    collecting: dict[Arm, list[float]] = field(default_factory=lambda: {"without": [], "with": []})
    """Seconds of each of these steps in which Python collected garbage: by chance in either arm."""

    def median(self, arm: Arm) -> float:
        """Return the median step of an arm."""
        return statistics.median(self.seconds[arm])

    def difference(self, of: Callable[[Sequence[float]], float]) -> tuple[float, float]:
        """Return the mean over pairs of how much longer `of` a block is with it, as a share, and
        its standard error; without collections of garbage."""

        def blocks(arm: Arm) -> list[float]:
            pairs = zip(self.seconds[arm], self.collecting[arm], strict=True)
            x = [seconds - collecting for seconds, collecting in pairs]
            return [of(x[i : i + self.block]) for i in range(0, len(x), self.block)]

        shares = [b / a - 1 for a, b in zip(blocks("without"), blocks("with"), strict=True)]
        return statistics.mean(shares), statistics.stdev(shares) / len(shares) ** 0.5

    def slow(self, arm: Arm) -> tuple[int, int]:
        """Return how many steps of an arm were slow, and in how many of these most of what was too
        long was a collection of garbage."""
        usual = self.median("without")
        found = [
            collected > (seconds - usual) / 2
            for seconds, collected in zip(self.seconds[arm], self.collecting[arm], strict=True)
            if seconds > SLOW * usual
        ]
        return len(found), sum(found)


def take_turns(
    step: Callable[[Arm], float],
    within: dict[Arm, Callable[[], AbstractContextManager[object]]],
    rounds: int,
    block: int,
) -> Turns:
    """Time blocks of steps, a pair a round, in the order A B, B A, A B, ...: a drift cancels out.

    Args:
        step: Does one, and returns its seconds.
        within: What each block of an arm is in.
        rounds: Pairs.
        block: Steps of a block that are timed. One before them is not, which may still do what the
            other arm's last one left.
    """
    turns = Turns(block)

    def do(arm: Arm) -> None:
        with within[arm]():
            step(arm)
            for _ in range(block):
                with collections() as collected:
                    turns.seconds[arm].append(step(arm))
                turns.collecting[arm].append(sum(collected))

    for _ in range(2):
        do("without")
    turns.seconds["without"].clear()
    turns.collecting["without"].clear()
    for index in range(rounds):
        order: tuple[Arm, Arm] = ("without", "with") if index % 2 else ("with", "without")
        for arm in order:
            do(arm)
    return turns


@contextmanager
def collections() -> Iterator[list[float]]:
    """Note how long each collection of garbage took."""
    found: list[float] = []
    begin = 0.0

    def note(phase: str, about: dict[str, int]) -> None:
        nonlocal begin
        if phase == "start":
            begin = time.perf_counter()
        else:
            found.append(time.perf_counter() - begin)

    gc.callbacks.append(note)
    try:
        yield found
    finally:
        gc.callbacks.remove(note)


def stay_on_own_cores(rank: int, ranks: int) -> None:
    """Give this process its share of the machine's cores, its own."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(len(cores) // ranks, 1)
    os.sched_setaffinity(0, cores[rank * share : (rank + 1) * share] or cores)
