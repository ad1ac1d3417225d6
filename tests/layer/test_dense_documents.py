"""Documents in dense attention as users ask for it: compiled, recomputed, wrong, across ranks."""

from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import lhcp
from lhcp import reference
from lhcp.comm.layout import make_layout
from lhcp.cost.calibration import Direction
from lhcp.cost.traffic import traffic
from lhcp.documents import Cut, limits_of
from lhcp.layer.module import Mode
from lhcp.reference_documents import documents
from lhcp.ring.shape import AttentionShape, Mask
from lhcp.testing.inputs import qkv, small_config
from lhcp.testing.ranks import RankPool
from tests.distributed.test_messages import MessageRecorder

SEQLEN = 48
CUTS = ([0, 7, 20, 48], [0, 1, 2, 48], [0, 5, 11, 30, 47, 48], [0, 48], [0, 24, 25, 26, 48])


def bounds(*starts: int) -> Tensor:
    return torch.tensor(starts, dtype=torch.int32)


def expected(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    docs = documents(cu_seqlens, q.shape[0], q.shape[1])[:, None]
    return reference.causal_attention(q, k, v, docs=docs)


def answers(attend: Any, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients of whole inputs on one rank."""
    q, k, v, do = qkv(SEQLEN, num_kv_heads=2)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attend(*leaves, cu_seqlens=cu_seqlens)
    return (out, *torch.autograd.grad(out, leaves, do))


def of_oracle(cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    return answers(expected, cu_seqlens)


def assert_same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("whole", [False, True], ids=["function", "layer"])
def test_one_graph_for_all_documents(whole: bool) -> None:
    """Fails if tracing breaks at the bounds, or a graph keeps those that it was traced with."""
    torch._dynamo.reset()
    attend: Any = lhcp.LighthouseAttention(None) if whole else lhcp.ring_attention
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    # The number of documents, of no matter which, becomes a symbol at its first change.
    for i, starts in enumerate(CUTS):
        with torch._dynamo.config.patch(error_on_recompile=i > 2):
            assert_same(answers(compiled, bounds(*starts)), of_oracle(bounds(*starts)))
    torch._dynamo.reset()


def test_recomputed() -> None:
    """Fails if activation checkpointing meets other documents when it attends again."""
    layer = lhcp.LighthouseAttention(None)

    def attend(*qkv_: Tensor, cu_seqlens: Tensor) -> Tensor:
        out: Tensor = checkpoint(layer, *qkv_, cu_seqlens=cu_seqlens, use_reentrant=False)
        return out

    for starts in CUTS:
        assert_same(answers(attend, bounds(*starts)), of_oracle(bounds(*starts)))


@pytest.mark.parametrize("mode", ["lighthouse", "dense"])
def test_compiled_without_a_gradient(mode: Mode) -> None:
    """Fails if an evaluation, or a call whose inputs want no gradient, does not compile."""
    config, seqlen = small_config(num_strata=4)
    layer = lhcp.LighthouseAttention(config)
    layer.mode = mode
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    q, k, v = (torch.randn(1, seqlen, 2, 8) for _ in range(3))
    for given in (bounds(0, 30, seqlen), None):
        wanted = layer(q, k, v, cu_seqlens=given)
        assert torch.equal(compiled(q, k, v, cu_seqlens=given), wanted)
        with torch.no_grad():
            assert torch.equal(compiled(q, k, v, cu_seqlens=given), wanted)


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        ([0, 48], TypeError, "cu_seqlens must be a tensor, got list"),
        (bounds(0, 47), ValueError, "goes from 0 to 47: must go from 0 to 48"),
        (bounds(0, 9, 9, 48), ValueError, r"cu_seqlens\[1:3\] is \[9, 9\]: must ascend"),
        (bounds(0, 48).float(), TypeError, "must be torch.int32"),
    ],
    ids=["list", "end", "empty", "dtype"],
)
def test_bounds_that_are_none(cu_seqlens: Any, error: type[Exception], message: str) -> None:
    q, k, v, _ = qkv(SEQLEN)
    with pytest.raises(error, match=message):
        lhcp.ring_attention(q, k, v, cu_seqlens=cu_seqlens)


WRONG: dict[str, Any] = {
    "other documents": bounds(0, 8, 48),
    "none": None,
    "too short": bounds(0, 7, 24),
}


def on_one_rank(group: Any, what: str, culprit: int, whole: bool) -> tuple[str, bool]:
    """Give one rank other documents; return what is said, and whether the next call works."""
    own = dist.new_group(range(4))
    parts = [lhcp.shard(x, own) for x in qkv(SEQLEN)[:3]]
    attend: Any = lhcp.ring_attention
    more: dict[str, Any] = {"group": own}
    if whole:
        attend, more = lhcp.LighthouseAttention(None, own), {}
    given = WRONG[what] if own.rank() == culprit else bounds(0, 7, 48)
    try:
        attend(*parts, cu_seqlens=given, **more)
    except (TypeError, ValueError) as error:
        out = attend(*parts, cu_seqlens=bounds(0, 7, 48), **more)
        return str(error), bool(out.isfinite().all())
    return "nothing said", False


@pytest.mark.parametrize("whole", [False, True], ids=["function", "layer"])
@pytest.mark.parametrize("what", list(WRONG))
@pytest.mark.parametrize("culprit", [0, 2])
def test_other_documents_are_said_on_every_rank(
    ranks: RankPool, culprit: int, what: str, whole: bool
) -> None:
    """Fails if a rank attends to documents that others do not have."""
    for rank, (said, works) in enumerate(ranks.run(on_one_rank, 4, what, culprit, whole)):
        assert works, said
        if what == "too short":
            assert "goes from 0 to 24" in said
            assert rank == culprit or f"rank {culprit} of 4 cannot go on" in said
        else:
            assert "ranks were asked for different things" in said
            assert "cu_seqlens: 2 documents of digest" in said or what == "none"


def sent(group: Any, layout: Any, starts: list[int] | None, tokens: int) -> list[int]:
    """How many chunks of keys this rank gives in a forward, and parts in its backward; of each so
    many tokens."""
    parts = [lhcp.shard(x, group, layout=layout) for x in qkv(SEQLEN)]
    q, k, v = (x.requires_grad_() for x in parts[:3])
    cu_seqlens = None if starts is None else bounds(*starts)
    found = []
    with MessageRecorder() as forward:
        o = lhcp.ring_attention(
            q,
            k,
            v,
            group=group,
            layout=layout,
            rotation="p2p",
            cu_seqlens=cu_seqlens,
            timers=lhcp.Timers(),
        )
    with MessageRecorder() as backward:
        torch.autograd.grad(o, (q, k, v), parts[3])
    for recorder in (forward, backward):
        sizes = {(kind, size) for kind, size, *_ in recorder.messages}
        assert sizes <= {("send", tokens * parts[1][0, 0].numel())}
        found.append(len(recorder.messages) // 2)
    return found


@pytest.mark.parametrize(
    ("starts", "total", "tokens"),
    [
        # W = 4, zigzag, chunks of 6: each chunk but a rank's own is seen by those after it.
        (None, 18, 6),
        # Documents of one chunk each, and of half a chunk more: none, or the one before.
        ([*range(0, SEQLEN + 1, 6)], 0, 6),
        ([0, *range(3, SEQLEN, 6), SEQLEN], 6, 6),
        # Of three tokens, which count as four: so many of the one before.
        ([0, *range(1, SEQLEN, 3), SEQLEN], 6, 4),
        ([0, *range(1, SEQLEN, 2), SEQLEN], 6, 2),
    ],
    ids=["none", "of a chunk", "across edges", "of three tokens", "of two"],
)
def test_keys_go_as_far_as_documents_reach(
    ranks: RankPool, starts: list[int] | None, total: int, tokens: int
) -> None:
    """Fails if keys that no document brings together travel all the same."""
    counts = ranks.run(sent, 4, "zigzag", starts, tokens)
    assert sum(forward for forward, _ in counts) == total
    # Keys travel in a backward too, and parts of their gradients as often.
    assert sum(backward for _, backward in counts) == 2 * total
    # The cost model counts the same: messages of k and of v, 4 heads of 16 in float64.
    cut = Cut(1, SEQLEN, 8, (0,))
    limits = [] if starts is None else limits_of(torch.tensor(starts[:-1]), cut).tolist()
    shape = AttentionShape(
        seqlen=SEQLEN,
        layout=make_layout("zigzag", 4),
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        element_bytes=8,
        mask=Mask(True, *limits),
    )
    for rank, both in enumerate(counts):
        for direction, chunks in zip(get_args(Direction), both, strict=True):
            counted = traffic("p2p", shape, direction, rank)
            assert counted.num_messages == 2 * chunks
            assert counted.num_bytes == counted.num_messages * tokens * 4 * 16 * 8
