"""Cores of this machine, dealt so that no two ranks share one.

Two hardware threads of a physical core that compute at once take up to twice as long each, and
which ranks those are changes while they run.
"""

import os
from collections.abc import Iterable
from pathlib import Path


def siblings(cpu: int) -> frozenset[int]:
    """Return the hardware threads of a CPU's physical core; itself alone where Linux hides it."""
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    if not path.exists():
        return frozenset({cpu})
    found: set[int] = set()
    for run in path.read_text().strip().split(","):
        start, _, stop = run.partition("-")
        found.update(range(int(start), int(stop or start) + 1))
    return frozenset(found)


LEAST = 4
"""Hardware threads of a rank: its own, gloo's of two groups that send at once, and the kernel's. On
two, a ring's messages took 11 to 20 ms of a backward's 100 that no model had."""


def deal(cores: Iterable[frozenset[int]], allowed: set[int], count: int) -> list[set[int]] | None:
    """Deal physical cores evenly, in order; None if some rank would have fewer threads than LEAST.

    Args:
        cores: the hardware threads of each. One that has some beyond `allowed` is left out: others
            may compute there.
    """
    whole = sorted({core for core in cores if core <= allowed}, key=min)
    share = len(whole) // count
    runs = (whole[i * share : (i + 1) * share] for i in range(count))
    dealt = [set[int]().union(*run) for run in runs]
    return dealt if min(map(len, dealt)) >= LEAST else None


def own_cores(count: int) -> list[set[int]] | None:
    """Deal the cores that this process may use: for each of `count` ranks its hardware threads."""
    allowed = os.sched_getaffinity(0)
    return deal(map(siblings, allowed), allowed, count)
