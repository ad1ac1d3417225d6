"""The tools of the tests: a pool that reports every rank's failure, a verdict that can fail."""

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lhcp.testing.inputs import poisoned_empty, qkv, small_config
from lhcp.testing.ranks import RankError, RankPool
from lhcp.testing.tolerance import assert_close_float64, assert_within_budget


def whoami(group: Any, offset: int) -> tuple[int, int, int]:
    return group.rank() + offset, group.size(), os.getpid()


def misbehave(group: Any, how: str) -> float:
    """On rank 1: raise, exit or hang, while the others wait for it."""
    if group.rank() == 1 and how == "raise":
        raise RuntimeError("rank 1 has had enough")
    if group.rank() == 1 and how == "exit":
        os._exit(3)
    if group.rank() == 1 and how == "hang":
        time.sleep(60)
    total = torch.ones(1)
    dist.all_reduce(total, group=group)
    return total.item()


def empties(group: Any) -> list[bool]:
    x = torch.zeros(2)
    made = (torch.empty(3), torch.empty_like(x), x.new_empty(4))
    return [bool(y.isnan().all()) for y in made]


def test_results_come_by_rank_from_ranks_that_stay(ranks: RankPool) -> None:
    """Fails if results are mixed up, or processes are started for each run."""
    first, second = ranks.run(whoami, 3, 10), ranks.run(whoami, 3, 20)
    assert [r[:2] for r in first] == [(10, 3), (11, 3), (12, 3)]
    assert [r[2] for r in first] == [r[2] for r in second]
    assert len({r[2] for r in first}) == 3


def test_ranks_are_poisoned(ranks: RankPool) -> None:
    """Fails if memory that nothing wrote looks innocent on a rank."""
    assert ranks.run(empties, 2) == [[True] * 3] * 2


def test_more_ranks_than_there_are(ranks: RankPool) -> None:
    with pytest.raises(ValueError, match="world_size=5: this pool has 4 ranks"):
        ranks.run(whoami, 5, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "message"),
    [("raise", "rank 1 has had enough"), ("exit", "rank 1 of 2: the process died"), ("hang", "no")],
)
def test_a_bad_rank_is_reported_and_the_pool_starts_anew(how: str, message: str) -> None:
    """Fails if a test could hang, or poison the next one."""
    pool = RankPool(2, timeout=15, grace=1)
    try:
        begin = time.monotonic()
        with pytest.raises(RankError, match=message):
            pool.run(misbehave, 2, how)
        assert time.monotonic() - begin < 40
        assert pool.run(misbehave, 2, "well") == [2, 2]
    finally:
        pool.close()


def test_poison_is_taken_back() -> None:
    before = (torch.empty, torch.empty_like)
    with poisoned_empty():
        assert torch.empty(2).isnan().all()
        assert torch.empty(2, dtype=torch.int64).min() > 2**60
        assert torch.empty(2, dtype=torch.bool).all()
    assert (torch.empty, torch.empty_like) == before


def test_inputs_are_those_of_their_seed() -> None:
    """Fails if ranks that draw the same inputs could differ."""
    state = torch.get_rng_state()
    first, second, other = qkv(8, seed=1), qkv(8, seed=1), qkv(8, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("pool_factor", [2, 3, 8])
@pytest.mark.parametrize("num_levels", [2, 3, 4])
def test_small_configs_do_work(num_levels: int, pool_factor: int) -> None:
    """Fails if a test's sizes leave the selection nothing to choose, or shorten nothing."""
    config, seqlen = small_config(num_levels, pool_factor)
    halves = 0.75 if (num_levels, pool_factor) == (2, 2) else 0.5
    assert config.subsequence_length(seqlen) <= halves * seqlen
    coarsest = seqlen // config.seqlen_multiple
    assert coarsest >= 4 * config.picks


def test_the_budget_can_be_exceeded() -> None:
    """Fails if the verdict accepts an error that plain torch does not make."""
    exact = torch.linspace(-1, 1, 101, dtype=torch.float64)
    rounded = exact.bfloat16()
    assert_within_budget("x", rounded, rounded, exact)
    wrong = rounded.clone()
    wrong[50] += 0.03
    with pytest.raises(AssertionError, match="x: error"):
        assert_within_budget("x", wrong, rounded, exact)
    wrong[50] = torch.nan
    with pytest.raises(AssertionError, match="not finite"):
        assert_within_budget("x", wrong, rounded, exact)


def test_float64_verdict_can_fail() -> None:
    x = torch.ones(3, dtype=torch.float64)
    assert_close_float64("x", x + 1e-11, x)
    for bad in (x + 1e-9, x[:2], x.float()):
        with pytest.raises(AssertionError):
            assert_close_float64("x", bad, x)
    nan = torch.tensor([1.0, torch.nan, 1.0], dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_close_float64("x", nan, x)
