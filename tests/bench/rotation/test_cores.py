"""Cores dealt to ranks."""

import os

from bench.rotation.cores import deal, own_cores, siblings


def test_ranks_share_no_physical_core() -> None:
    """Fails if two ranks get hardware threads of one core, or a core that others may use."""
    # Threads k and k + 6 are siblings; 1 is somebody else's.
    cores = [frozenset({core, core + 6}) for core in range(6)]
    assert deal(cores, set(range(12)), 2) == [{0, 6, 1, 7, 2, 8}, {3, 9, 4, 10, 5, 11}]
    assert deal(cores, set(range(12)) - {1}, 2) == [{0, 6, 2, 8}, {3, 9, 4, 10}]


def test_too_few_cores_are_not_dealt() -> None:
    """Fails if ranks are crowded onto cores that the scheduler would share out better."""
    cores = [frozenset({2 * core, 2 * core + 1}) for core in range(6)]
    assert deal(cores, set(range(12)), 3) == [{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9, 10, 11}]
    assert deal(cores, set(range(12)), 4) is None
    assert deal(cores, set(), 1) is None
    assert own_cores(len(os.sched_getaffinity(0))) is None


def test_a_core_is_among_its_own_threads() -> None:
    """Fails if what Linux says of hardware threads is misread."""
    for cpu in os.sched_getaffinity(0):
        assert cpu in siblings(cpu)
