"""Rotary positions: products see distances only."""

import pytest
import torch

from lhcp.training.rope import rope_table, rotate


def test_rope_sees_distances_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))

    def product(i: int, j: int) -> float:
        tables = (rope_table(torch.tensor([at]), 16, 10000.0) for at in (i, j))
        turned_q, turned_k = (rotate(x, *t) for x, t in zip((q, k), tables, strict=True))
        return float((turned_q * turned_k).sum())

    assert product(5, 3) == pytest.approx(product(1_000_005, 1_000_003), abs=1e-5)
    assert product(5, 3) != pytest.approx(product(5, 4), abs=1e-3)
