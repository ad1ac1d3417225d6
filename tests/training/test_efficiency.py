"""What a step takes of arithmetic, counted from the weights."""

from math import prod

import pytest

from lhcp import LighthouseConfig
from lhcp.training.efficiency import flops_per_token
from tests.training.test_model import SMALL, small


def test_flops_of_the_matrices_and_of_attention() -> None:
    model = small()
    matrices = sum(
        prod(p.shape) for n, p in model.named_parameters() if p.ndim > 1 and "embedding" not in n
    )
    assert flops_per_token(SMALL, 1000) == 6 * matrices + 6 * 3 * 32 * 1000
    config = LighthouseConfig(num_levels=2, pool_factor=4, topk=16, num_strata=4)
    length = config.subsequence_length(1024)
    expected = 6 * matrices + 6 * 32 * (1024 + 2 * length**2 / 1024)
    assert flops_per_token(SMALL, 1024, config) == pytest.approx(expected)
