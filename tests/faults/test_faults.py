"""Every row of the table of faults ends in words, in time, and with what it says survives."""

from pathlib import Path

import pytest

from tests.faults.provoke import goes_on_after
from tests.faults.rows import FAULTS, Fault, silent

QUICK = ("a rank is killed", "a rank is frozen")
"""In each commit's tests."""
ALONE = (
    *("rank 0, which keeps the store, is frozen", "a rank is frozen as ranks connect"),
    *("the disk is full", "a folder that not all ranks share", "a cable is pulled"),
)
"""What no test of a part provokes, beside four ranks; they have minutes."""


def tier(fault: Fault) -> object:
    """Return a fault in its tier; those of soak have tests of the part that says so, elsewhere."""
    if fault.name in QUICK:
        return pytest.param(fault, id=fault.name)
    slow = fault.world == 4 or fault.name in ALONE
    return pytest.param(fault, id=fault.name, marks=pytest.mark.slow if slow else pytest.mark.soak)


@pytest.mark.parametrize("fault", [tier(fault) for fault in FAULTS])
def test_a_fault_ends_in_words(tmp_path: Path, fault: Fault) -> None:
    """Fails if it is silent, takes longer than it may, ends as a success, or loses the run."""
    try:
        outcome = fault.provoke(tmp_path)
    except PermissionError as error:
        pytest.skip(str(error))
    assert silent(fault, outcome) == "", outcome
    if fault.goes_on:
        assert goes_on_after(tmp_path) >= 24
