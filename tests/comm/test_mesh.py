"""What is passed as `group` by a rank that it does not hold, or without what it needs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import lhcp
from lhcp.testing.ranks import RankPool

WORLD = 4
"""All ranks of the pool: those that make no group with the others would name later ones apart."""

GROUPS: dict[str, Callable[[], Any]] = {
    "group": lambda: dist.new_group([0, 1]),
    "mesh": lambda: DeviceMesh("cpu", [0, 1]),
    "mesh of two axes": lambda: DeviceMesh("cpu", [[0], [1]], mesh_dim_names=("node", "local")),
}


def said_outside(group: Any, name: str) -> list[str]:
    """Make a group of the ranks 0 and 1 on all ranks, and use it on all."""
    part = GROUPS[name]()
    said = []
    for use in (
        lambda: lhcp.positions(64, part),
        lambda: lhcp.shard(torch.zeros(1, 64, 2), part),
        lambda: lhcp.LighthouseAttention(None, part, rotation="hierarchical"),
    ):
        try:
            use()
        except ValueError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("name", list(GROUPS))
def test_a_rank_outside_is_told_so(ranks: RankPool, name: str) -> None:
    """Fails if a rank outside gets another's words, or a rank inside an error."""
    for rank, said in enumerate(ranks.run(said_outside, WORLD, name)):
        assert len(said) == (3 if rank > 1 else 0)
        assert all(f"is not in (global rank {rank})" in text for text in said)


def said_of_no_names(group: Any) -> str:
    try:
        lhcp.positions(64, DeviceMesh("cpu", [[0, 1], [2, 3]]))
    except ValueError as error:
        return str(error)
    return "nothing said"


def test_two_axes_need_names(ranks: RankPool) -> None:
    """Fails if the remedy is not said: torch makes no group of all ranks without names."""
    assert all("mesh_dim_names=(" in said for said in ranks.run(said_of_no_names, WORLD))
