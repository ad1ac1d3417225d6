"""How layers are put together into units whose weights travel at once."""

import pytest
from torch import nn

from lhcp.training.fsdp import units


def layers(*sizes: int) -> list[nn.Module]:
    return [nn.Linear(1, size, bias=False) for size in sizes]


@pytest.mark.parametrize(
    ("sizes", "least", "want"),
    [
        ((4, 4, 4, 4, 4), 8, [2, 2, 1]),
        ((4, 4, 4, 4, 4), 9, [3, 2]),
        # One that is large enough is alone, whatever comes before or after it.
        ((4, 4, 4), 4, [1, 1, 1]),
        ((4, 4, 4), 1, [1, 1, 1]),
        ((2, 9, 2, 2), 8, [2, 2]),
        ((4, 4), 100, [2]),
        ((), 8, []),
    ],
)
def test_units_are_no_larger_than_they_must_be(sizes, least, want) -> None:
    given = layers(*sizes)
    made = units(given, least)
    assert [len(unit) for unit in made] == want
    assert [layer for unit in made for layer in unit] == given
