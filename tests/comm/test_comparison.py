"""What ranks say to one another through the store of their group."""

from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from lhcp.comm.comparison import compare
from lhcp.comm.mesh import Ranks
from lhcp.comm.torch_private import store_of
from lhcp.testing.ranks import RankPool

WORLD = 4


def late(group: Any) -> str:
    own = dist.new_group(range(WORLD))
    if own.rank() == 2:
        return ""
    store = store_of(own)
    # Of the one store of all groups, which later tests wait at.
    before = store.timeout
    store.set_timeout(timedelta(seconds=2))
    try:
        with pytest.raises(ValueError) as error:
            compare(Ranks(own), {"call": "x"})
    finally:
        store.set_timeout(before)
    return str(error.value)


def test_a_rank_that_does_not_come_is_named(ranks: RankPool) -> None:
    """Fails if ranks that wait for another do not say for whom."""
    said = ranks.run(late, WORLD)
    for rank in (0, 1, 3):
        assert said[rank].startswith("ranks [2] of 4 did not make this call within the timeout")
