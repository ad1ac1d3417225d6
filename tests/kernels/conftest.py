"""Kernel tests run on the GPU where there is one, else under the Triton interpreter."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from lhcp.testing.inputs import poisoned_empty


@pytest.fixture(autouse=True)
def poisoned_and_seeded(request: pytest.FixtureRequest) -> Iterator[None]:
    """Inputs are the test's own; an element that nothing writes shows as NaN."""
    torch.manual_seed(0)
    with nullcontext() if request.config.getoption("--unpoisoned") else poisoned_empty():
        yield
