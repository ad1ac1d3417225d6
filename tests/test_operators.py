"""The opaque operators keep torch's contract: schema, fake results, no aliases."""

from typing import Any

import pytest
import torch

from lhcp.comm.mesh import Ranks
from lhcp.layer.lighthouse import local_geometry
from lhcp.lighthouse import stages
from lhcp.lighthouse.scatter import scatter
from lhcp.operators import joined, parted
from lhcp.testing.inputs import qkv, small_config


def arguments(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Arguments for every operator of the library that one rank can call."""
    config, seqlen = small_config()
    q, k, v, do = qkv(seqlen, batch=2, num_kv_heads=2, dtype=dtype)
    sizes = stages.to_list(local_geometry(config, seqlen, Ranks(), "zigzag"))
    geom = stages.from_list(sizes)
    pooled_q, pooled_k, pooled_v, sq, sk = stages.pool_and_score(q, k, v, sizes, True, "torch")
    entries, places = stages.select_entries(sq, sk, sizes, "torch")
    sub = stages.gather_subsequence(q, k, v, pooled_q, pooled_k, pooled_v, entries, sizes, "torch")
    o = torch.randn_like(sub[0])
    assert scatter(o, places, geom).shape == q.shape
    words = joined(["", "", "", "zigzag", "p2p", "cpu"])
    out, lse = torch.ops.lhcp.ring_forward(*sub, words, True, 0.25)
    where = joined(["", "", "", "zigzag"])
    return {
        "pool_and_score": (q, k, v, sizes, True, "torch"),
        "score_tensors": (q, k, sizes, "torch"),
        "select": (sq, sk, sizes, "torch"),
        "gather": (q, k, v, pooled_q, pooled_k, pooled_v, entries, sizes, "torch"),
        "gather_backward": (*sub, places, sizes, "torch"),
        "ring_forward": (*sub, words, True, 0.25),
        "ring_backward": (o, *sub, out, lse, words, True, 0.25),
        "scatter_back": (o, places, sizes, "torch", where),
        "scatter_back_backward": (do, entries, places, sizes, "torch", where),
    }


NAMES = list(arguments(torch.float32))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_contract(name: str, dtype: torch.dtype) -> None:
    """Fails if a fake result has another shape, dtype or stride, or a result is an input's view."""
    operator = getattr(torch.ops.lhcp, name).default
    # No autograd: the autograd.Functions that call the operators own it.
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator, arguments(dtype)[name], test_utils=checks)


def test_without_scores_nothing_is_scored() -> None:
    config, seqlen = small_config()
    q, k, v, _ = qkv(seqlen)
    sizes = stages.to_list(local_geometry(config, seqlen, Ranks(), "zigzag"))
    *_, sq, sk = stages.pool_and_score(q, k, v, sizes, False, "torch")
    assert sq.numel() == sk.numel() == 0


def test_arguments_are_on_one_line() -> None:
    """Fails if the comments that torch.compile writes with them would end in the middle."""
    words = ["12", "", "", "zigzag", "p2p", "fa4"]
    assert parted(joined(words)) == words
    assert "\n" not in joined(words)
