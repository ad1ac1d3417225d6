"""`ContextParallel(debug=True)`: what it makes is debugged, and each batch is compared."""

from typing import Any

import pytest
import torch

import lhcp
from lhcp.testing.inputs import qkv, small_config
from lhcp.testing.ranks import RankPool


def second_batch(group: Any, debug: bool) -> str:
    """Shard a batch that all ranks hold, then one that rank 1 holds otherwise."""
    cp = lhcp.ContextParallel(group, debug=debug)
    tokens = torch.arange(32).view(2, 16)
    cp.shard({"input_ids": tokens})
    try:
        cp.shard({"input_ids": tokens + (group.rank() == 1)})
    except ValueError as error:
        return str(error)
    return ""


def test_each_batch_is_compared(ranks: RankPool) -> None:
    """Fails if a sampler that goes astray later is not found, or costs everybody a meeting."""
    assert ranks.run(second_batch, 2, False) == ["", ""]
    for said in ranks.run(second_batch, 2, True):
        assert said.startswith("ranks were asked for different things: batch['input_ids']: ")


@pytest.mark.parametrize("made", ["attention", "dense", "sdpa"])
def test_what_it_makes_is_debugged(made: str) -> None:
    """Fails if one of the ways to attend drops the choice."""
    cp = lhcp.ContextParallel(debug=True)
    config, seqlen = small_config(num_strata=8)
    q, k, v, _ = qkv(seqlen, num_kv_heads=2)
    v[0, 1] = torch.nan
    with pytest.raises(ValueError, match="v of rank 0 of 1 has"):
        if made == "sdpa":
            heads_first = (x.transpose(1, 2) for x in (q, k, v))
            cp.sdpa(*heads_first, is_causal=True, enable_gqa=True)
        else:
            cp.attention(config if made == "attention" else None)(q, k, v)
