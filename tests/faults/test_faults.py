"""Every row of the table of faults ends in words, in time, and with what it says survives."""

from pathlib import Path

import pytest

from tests.faults.provoke import goes_on_after
from tests.faults.rows import FAULTS, Fault, silent

QUICK = ("a rank is killed", "a rank is frozen")
"""In each commit's tests; all others have minutes."""


def tier(fault: Fault) -> object:
    if fault.name in QUICK:
        return pytest.param(fault, id=fault.name)
    soak = "torchrun" in fault.name
    return pytest.param(fault, id=fault.name, marks=pytest.mark.soak if soak else pytest.mark.slow)


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
