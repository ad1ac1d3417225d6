"""Cores dealt to ranks."""

import os

from bench.rotation.cores import deal, own_cores, siblings


def test_ranks_share_no_physical_core() -> None:
    """Fails if two ranks get hardware threads of one core, or a core that others may use."""
    # Threads k and k + 4 are siblings; 1 is somebody else's.
    cores = [frozenset({core, core + 4}) for core in range(4)]
    assert deal(cores, set(range(8)), 2) == [{0, 4, 1, 5}, {2, 6, 3, 7}]
    assert deal(cores, set(range(8)) - {1}, 3) == [{0, 4}, {2, 6}, {3, 7}]
    # Neighbours are siblings, and what does not come out even is left over.
    assert deal([frozenset({i, i + 1}) for i in (4, 6, 8)], set(range(4, 10)), 2) == [
        {4, 5},
        {6, 7},
    ]


def test_fewer_cores_than_ranks_are_not_dealt() -> None:
    """Fails if ranks are crowded onto cores that the scheduler would share out better."""
    assert deal([frozenset({0, 1})], {0, 1}, 2) is None
    assert own_cores(2 * len(os.sched_getaffinity(0))) is None


def test_a_core_is_among_its_own_threads() -> None:
    """Fails if what Linux says of hardware threads is misread."""
    for cpu in os.sched_getaffinity(0):
        assert cpu in siblings(cpu)
    (alone,) = own_cores(1) or [set()]
    assert alone <= os.sched_getaffinity(0)
