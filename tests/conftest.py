"""Pools of ranks that live as long as the session, started when first asked for."""

import os
from collections.abc import Iterator

import pytest
import torch

from lhcp.testing.inputs import poisoned_empty
from lhcp.testing.ranks import RankPool

# Before anything imports a kernel: Triton decides at the decorator whether it interprets.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--unpoisoned",
        action="store_true",
        help="leave what torch.empty returns to kernels' tests as it is, for initcheck",
    )


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Up to four gloo ranks, in which torch.empty returns NaN."""
    pool = RankPool(4, poison=True)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def eight_ranks() -> Iterator[RankPool]:
    """Eight gloo ranks, in which torch.empty returns NaN."""
    pool = RankPool(8, poison=True)
    yield pool
    pool.close()


@pytest.fixture
def poison() -> Iterator[None]:
    """torch.empty returns NaN: an element that nothing writes shows in the result."""
    with poisoned_empty():
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread, as ranks have: sums inside torch then have one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
