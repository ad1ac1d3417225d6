"""Ranks that were asked for different things are told so, all of them, before anything is sent."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import lhcp
from lhcp.comm.torch_private import store_of
from lhcp.testing.inputs import small_config
from lhcp.testing.ranks import RankPool

CONFIG, SEQLEN = small_config(num_strata=8, picks=4)
WORLD = 4
"""All ranks of the pool: those that make no group with the others would name later ones apart."""

OTHER: dict[str, Callable[[Tensor], Tensor]] = {
    "dtype": lambda x: x.float(),
    "head_dim": lambda x: x[..., :8],
    "batch": lambda x: x[:1],
    "length": lambda x: torch.cat([x, x], 1),
    "no batch": lambda x: x[:0],
    "odd length": lambda x: x[:, :-1],
}


def first_call(group: Any, function: str, what: str, culprit: int) -> tuple[str, bool]:
    """Make a first call that is another on one rank; return its error, and whether the next works.

    A group of its own: what was agreed in one is not agreed in another.
    """
    own = dist.new_group(range(WORLD))
    n = SEQLEN // WORLD
    q, k, v = (torch.randn(2, n, heads, 16, dtype=torch.float64) for heads in (4, 2, 2))

    def call(*tensors: Tensor) -> Tensor:
        if function == "unshard":
            return lhcp.unshard(tensors[0], own)
        if function == "dense":
            return lhcp.ring_attention(*tensors, group=own, rotation="p2p")
        return lhcp.lighthouse_attention(*tensors, config=CONFIG, group=own)

    change = OTHER[what] if own.rank() == culprit else lambda x: x
    try:
        call(*map(change, (q, k, v)))
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}", bool(call(q, k, v).isfinite().all())
    return "nothing said", False


@pytest.mark.parametrize("culprit", [0, 2])
@pytest.mark.parametrize("what", list(OTHER))
@pytest.mark.parametrize("function", ["dense", "lighthouse"])
def test_another_first_call_is_said_on_every_rank(
    ranks: RankPool, function: str, what: str, culprit: int
) -> None:
    """Fails if one rank's news is a connection that was reset, or a result of other sizes."""
    for rank, (said, works) in enumerate(ranks.run(first_call, WORLD, function, what, culprit)):
        if "cannot go on" in said:
            assert rank != culprit and said.startswith(f"ValueError: rank {culprit} of 4 cannot")
        elif "different things" in said:
            assert "on rank 0" in said and "q: [" in said
        else:
            # Its own words for what it was given.
            assert rank == culprit and what in ("no batch", "odd length")
        assert works


@pytest.mark.parametrize("what", ["dtype", "batch", "length", "no batch"])
def test_another_unshard_is_said_on_every_rank(ranks: RankPool, what: str) -> None:
    """Fails if bytes of one shape are read as another's."""
    for said, works in ranks.run(first_call, WORLD, "unshard", what, 1):
        assert "unshard: " in said and "on rank 1" in said and works


CHOICES: dict[str, dict[str, Any]] = {
    "scale": {"scale": 0.3},
    "config.topk": {"config": replace(CONFIG, topk=2 * CONFIG.topk)},
    "config.num_strata": {"config": replace(CONFIG, num_strata=2 * CONFIG.num_strata)},
    "layout": {"layout": "contiguous"},
    "config.scorer": {"config": replace(CONFIG, scorer="dilated")},
    "rotation": {"rotation": "allgather"},
    "backend": {"backend": "cpu"},
}


def other_choice(group: Any, name: str) -> str:
    own = dist.new_group(range(WORLD))
    q, k, v = (torch.randn(1, SEQLEN // WORLD, heads, 16) for heads in (4, 2, 2))
    options = {"config": CONFIG, "rotation": "p2p", "backend": "math"}
    if own.rank() == 3:
        options |= CHOICES[name]
    with pytest.raises(ValueError) as error:
        lhcp.lighthouse_attention(q, k, v, group=own, **options)
    return str(error.value)


@pytest.mark.parametrize("name", list(CHOICES))
def test_another_choice_is_named_alone(ranks: RankPool, name: str) -> None:
    """Fails if ranks of equal message sizes mean different functions, or all is listed."""
    for said in ranks.run(other_choice, WORLD, name):
        assert said.startswith(f"ranks were asked for different things: {name}: ")
        assert "on rank 3" in said and "Ranks that differ from" in said
        assert ("scale" if name == "layout" else "layout") not in said


def gradient_on_one(group: Any) -> str:
    own = dist.new_group(range(WORLD))
    q, k, v = (torch.randn(1, SEQLEN // WORLD, heads, 16) for heads in (4, 2, 2))
    with pytest.raises(ValueError) as error:
        lhcp.ring_attention(q.requires_grad_(own.rank() == 1), k, v, group=own)
    return str(error.value)


def test_a_backward_that_one_rank_would_wait_in_is_said(ranks: RankPool) -> None:
    """Fails if one rank's backward waits for messages of ranks that need no gradient."""
    for said in ranks.run(gradient_on_one, WORLD):
        assert "a gradient: not wanted on rank 0, wanted on rank 1" in said


def shape_by_shape(group: Any) -> tuple[int, list[str]]:
    """Return the number of keys in the store after calls of three lengths, each made twice."""
    own = dist.new_group(range(WORLD))
    store = store_of(own)
    kept = []
    for length in (64, 128, 64, 192, 128):
        x = torch.randn(1, length, 2, 16)
        lhcp.ring_attention(x, x, x, group=own)
    for number in (1, 2, 3, 4):
        kept += [f"{number}/{rank}" for rank in range(4) if store.check([f"lhcp/{number}/{rank}"])]
    dist.barrier(own)
    return own.rank(), kept


def test_what_was_agreed_is_asked_once_and_forgotten(ranks: RankPool) -> None:
    """Fails if a known call talks to the store, or if the store grows with the lengths seen."""
    for rank, kept in ranks.run(shape_by_shape, WORLD):
        numbers = {entry.split("/")[0] for entry in kept}
        # Others may not have dropped their second post yet; nobody has made a fourth.
        assert f"3/{rank}" in kept and f"2/{rank}" not in kept
        assert numbers <= {"2", "3"}
