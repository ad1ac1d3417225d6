"""Kernel tests run on the GPU where there is one, else under the Triton interpreter."""

import os

import torch

# Read when a kernel module is imported, so set before any of them is.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest

from tests.kernels.cases import poisoned_empty


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fill what torch.empty returns with NaN or garbage: an unwritten element then shows."""
    poisoned_empty(monkeypatch)


@pytest.fixture(params=[0], autouse=True)
def seed(request):
    torch.manual_seed(request.param)
