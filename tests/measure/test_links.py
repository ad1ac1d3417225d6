"""How the benchmarks tell a link's latency from its bandwidth."""

from collections.abc import Callable

import pytest
import torch

from lhcp.comm.mesh import Ranks
from lhcp.measure import links


@pytest.mark.parametrize("short, long, rate", [(1e-3, 3e-3, 5e8), (2e-3, 1e-3, 1e9)])
def test_a_noisy_link_is_not_endlessly_fast(
    monkeypatch: pytest.MonkeyPatch, short: float, long: float, rate: float
) -> None:
    """Fails if a long message that took no longer than a short one had bytes that cost nothing."""
    large = 10**6
    monkeypatch.setattr(links.dist, "barrier", lambda group: None)

    def make(num_bytes: int) -> Callable[[], float]:
        return lambda: long if num_bytes == large else short

    def clock(run: Callable[[], float], device: torch.device, repeats: int) -> float:
        return run()

    found = links.latency_and_rate(make, large, Ranks(), torch.device("cpu"), clock)
    assert found[1] == pytest.approx(rate, rel=2e-3)
    assert 0 <= found[0] <= short


def test_ranks_that_quick_pairs_join_are_one_node() -> None:
    """Fails if nodes are merged, or one slow pair of a node divides it."""
    two = {(0, 1): 4.0, (0, 2): 0.1, (0, 3): 0.1, (1, 2): 0.1, (1, 3): 0.2, (2, 3): 3.0}
    assert links.islands(two, 4.0) == [[0, 1], [2, 3]]
    assert links.islands(two | {(1, 3): 1.0}, 4.0) == [[0, 1, 2, 3]]
    assert links.islands({(0, 1): 4.0, (0, 2): 0.1, (1, 2): 0.1}, 4.0) == [[0, 1], [2]]
    assert links.islands(two | {(2, 3): 0.9}, 4.0) == [[0, 1], [2, 3]]
    assert links.islands({(0, 1): 4.0, (0, 2): 2.0, (1, 2): 1.1}, 4.0) == [[0, 1, 2]]
    assert links.islands({(0, 1): 4.0}, 4.0) == [[0, 1]]
