"""What a CUDA graph refuses is not done: nothing of a call is made on the host for its device.

A CPU captures nothing. There, what would be a copy from the host shows as an operator: a list that
indexes, or becomes a tensor. tests/gpu/test_graphs.py captures.
"""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lhcp
from lhcp.comm.layout import LayoutName
from lhcp.testing.inputs import qkv
from lhcp.testing.ranks import RankPool
from tests.cases import LAYOUTS, ROTATIONS, TWO_AXES

FROM_THE_HOST = {"index", "index_put", "index_put_", "lift_fresh", "scalar_tensor"}


class Made(TorchDispatchMode):
    """Record what makes, or takes, a tensor that was numbers of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in FROM_THE_HOST:
            self.ops.append(name)
        return func(*args, **(kwargs or {}))


def made(group: Any, rotation: str, layout: LayoutName) -> list[str]:
    """Attend twice, forward and backward; return what the second call made."""
    q, k, v, do = (lhcp.shard(x, group, layout=layout) for x in qkv(192, num_kv_heads=2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    # With timers the ring goes through no operators, which a mode does not look into.
    choices = {"group": group, "rotation": rotation, "layout": layout, "timers": lhcp.Timers()}

    def call() -> None:
        torch.autograd.grad(lhcp.ring_attention(*leaves, **choices), leaves, do)

    # In their first call ranks compare what they mean.
    call()
    with Made() as mode:
        call()
    return mode.ops


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_nothing_is_made_on_the_host(ranks: RankPool, rotation: str, layout: LayoutName) -> None:
    """Fails if a rotation indexes by a list, which waits for the GPU and ends a capture."""
    nodes = 2 if rotation in TWO_AXES else None
    assert ranks.run(made, 4, rotation, layout, num_nodes=nodes) == [[]] * 4


def test_such_an_index_is_seen() -> None:
    """Fails if the operators that are looked for are not those of an index by a list."""
    with Made() as mode:
        torch.zeros(4, 2)[[2, 0]]
        torch.tensor([1.0])
    assert mode.ops == ["lift_fresh", "index", "lift_fresh"]
