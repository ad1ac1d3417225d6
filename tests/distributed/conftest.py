"""Every test here runs with NaN in what torch.empty returns, and one thread."""

import pytest


@pytest.fixture(autouse=True)
def setting(poison: None, one_thread: None) -> None:
    pass
