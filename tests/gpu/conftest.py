"""Tests that need a GPU: skipped as a whole where there is none."""

import os
from collections.abc import Iterator

import pytest
import torch

# Products of torch's deterministic mode ask for it, before the first of the process.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """The same bits every run; with warn_only torch's flash would still add in any order."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
