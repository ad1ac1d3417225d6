"""Kernel tests run on the GPU where there is one, else under the Triton interpreter."""

import os
from collections.abc import Iterator

import pytest
import torch

from lhcp.testing.inputs import poisoned_empty

# Read when a kernel module is imported, so set before any of them is.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def poisoned_and_seeded() -> Iterator[None]:
    """Inputs are the test's own; an element that nothing writes shows as NaN."""
    torch.manual_seed(0)
    with poisoned_empty():
        yield
