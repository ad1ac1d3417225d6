"""Sizes that fit nothing are refused by name."""

from dataclasses import replace

import pytest

from tests.training.test_model import SMALL


@pytest.mark.parametrize(
    "broken", [{"head_dim": 7}, {"num_kv_heads": 3}, {"dense_layers": (3,)}, {"dim": 0}]
)
def test_broken_sizes_are_named(broken: dict[str, object]) -> None:
    (name,) = broken
    with pytest.raises(ValueError, match=name):
        replace(SMALL, **broken)
