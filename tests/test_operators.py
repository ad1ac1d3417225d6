"""The opaque operators keep torch's contract: schema, fake results, no aliases."""

from typing import Any

import pytest
import torch

from lhcp.comm.layout import make_layout
from lhcp.comm.mesh import Ranks
from lhcp.layer.select import local_geometry
from lhcp.lighthouse import operators
from lhcp.lighthouse.geometry import Geometry
from lhcp.lighthouse.scatter import scatter
from lhcp.operators import pack_integers, pack_words, unpack_integers, unpack_words
from lhcp.ring.plan import RingPlan
from lhcp.ring.shape import FULL, AttentionShape, Tuning
from lhcp.testing.inputs import qkv, small_config


def arguments(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Arguments for every operator of the library that one rank can call."""
    config, seqlen = small_config()
    q, k, v, do = qkv(seqlen, batch=2, num_kv_heads=2, dtype=dtype)
    geom = local_geometry(config, seqlen, Ranks(), "zigzag")
    sizes = pack_integers(geom)
    *means, sq, sk = operators.pool_and_score(q, k, v, sizes, True, "torch")
    entries, rows = operators.select_entries(sq, sk, sizes, "torch")
    sub = operators.gather_subsequence([q, k, v], means, entries, sizes, "torch")
    o = torch.randn_like(sub[0])
    assert scatter(o, rows, geom).shape == q.shape
    shape = AttentionShape(
        seqlen=sub[0].shape[1],
        layout=make_layout("zigzag", 1),
        num_heads=4,
        num_kv_heads=2,
        head_dim=q.shape[3],
        batch=2,
        element_bytes=dtype.itemsize,
    )
    plan = RingPlan(Ranks(), shape, "p2p", "cpu", 0.25).pack()
    out, lse = torch.ops.lhcp.ring_forward(*sub, [], *plan)
    # Documents of the batch's two rows, of one entry and of all others each.
    numbers = torch.ones(2, 1, shape.seqlen, dtype=torch.int32).cumsum(0, dtype=torch.int32) * 2
    numbers[..., 0] -= 1
    packed = [numbers, torch.tensor([2, shape.seqlen, 0])]
    where = pack_words(["", "", "", "zigzag", "torch"])
    # Positions in documents of 7 tokens, of the second row of all.
    positions = torch.arange(seqlen, dtype=torch.int32).repeat(2, 1)
    positions[0] %= 7
    bounds = torch.tensor([0, 5, seqlen, 2 * seqlen], dtype=torch.int32)
    rule = [config.num_levels, config.pool_factor, config.topk, config.num_strata]
    return {
        "documents": (bounds, q, [2, seqlen, 1, 0], rule, ""),
        "pool_and_score of documents": (q, k, v, sizes, True, "torch", positions),
        "score_tensors of documents": (q, k, sizes, "torch", positions),
        "select of documents": (sq, sk, sizes, "torch", positions),
        "gather_backward of documents": (*sub, rows, sizes, "torch", positions),
        "scatter_back of documents": (o, rows, sizes, where, positions),
        "scatter_back_backward of documents": (do, entries, rows, sizes, where, positions),
        "pool_and_score": (q, k, v, sizes, True, "torch"),
        "score_tensors": (q, k, sizes, "torch"),
        "select": (sq, sk, sizes, "torch"),
        "gather": ([q, k, v], means, entries, sizes, "torch"),
        "gather_backward": (*sub, rows, sizes, "torch"),
        "ring_forward": (*sub, [], *plan),
        "ring_backward": (o, [*sub], [out, lse], *plan),
        "ring_forward of documents": (*sub, packed, *plan),
        "ring_backward of documents": (o, [*sub], [out, lse, *packed], *plan),
        "scatter_back": (o, rows, sizes, where),
        "scatter_back_backward": (do, entries, rows, sizes, where),
    }


NAMES = list(arguments(torch.float32))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_contract(name: str, dtype: torch.dtype) -> None:
    """Fails if a fake result has another shape, dtype or stride, or a result is an input's view."""
    operator = getattr(torch.ops.lhcp, name.split()[0]).default
    # No autograd: the autograd.Functions that call the operators own it.
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator, arguments(dtype)[name], test_utils=checks)


def test_without_scores_nothing_is_scored() -> None:
    config, seqlen = small_config()
    q, k, v, _ = qkv(seqlen)
    sizes = pack_integers(local_geometry(config, seqlen, Ranks(), "zigzag"))
    *_, sq, sk = operators.pool_and_score(q, k, v, sizes, False, "torch")
    assert sq.numel() == sk.numel() == 0


def test_arguments_are_on_one_line() -> None:
    """Fails if the comments that torch.compile writes with them would end in the middle."""
    words = ["12", "", "", "zigzag", "p2p", "fa4"]
    assert unpack_words(pack_words(words)) == words
    assert "\n" not in pack_words(words)


def test_records_come_back_whole() -> None:
    """Fails if a field is lost on the way into an operator, or a flag comes out as a number."""
    shape = AttentionShape(
        seqlen=1,
        layout=make_layout("contiguous", 1),
        num_heads=2,
        num_kv_heads=3,
        head_dim=4,
        batch=5,
        element_bytes=6,
        wire_bytes=7,
        mask=FULL,
        node_size=8,
        tuning=Tuning(*range(9, 9 + len(Tuning._fields))),
    )
    defaults = AttentionShape(
        seqlen=0, layout=shape.layout, num_heads=0, num_kv_heads=0, head_dim=0
    )
    for name in vars(shape):
        assert name == "layout" or getattr(shape, name) != getattr(defaults, name), name
    plan = RingPlan(Ranks(), shape, "p2p", "math", 0.5)
    assert RingPlan.unpack(plan.pack()) == plan
    geom = local_geometry(*small_config(), Ranks(), "zigzag")
    back = unpack_integers(Geometry, pack_integers(geom))
    assert back == geom and back.has_first is True
