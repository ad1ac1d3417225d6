"""Documents in the lighthouse layer as users ask for it: compiled, recomputed, as graphs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lhcp
from lhcp import reference
from lhcp.documents import Cut
from lhcp.layer.choices import Choices
from lhcp.layer.given import Given
from lhcp.layer.lighthouse import sparse_attention
from lhcp.layer.module import LighthouseAttention, Mode
from lhcp.lighthouse.kernel_set import QKV
from lhcp.packing import read_packing
from lhcp.reference_documents import documents
from lhcp.testing.inputs import qkv, small_config
from lhcp.testing.ranks import RankPool
from tests.layer.graphs import Again, with_graphs

CONFIG, SEQLEN = small_config(num_strata=8, picks=4)
CUTS = ([9, 40], [1, 2, 77, 78, 130], [3, 4, 5, 6, 7], [64, 128, 200], [100, 101])


def bounds(*cuts: int, batch: int = 1) -> Tensor:
    rows = [row * SEQLEN + t for row in range(batch) for t in (0, *(c + row for c in cuts))]
    return torch.tensor([*rows, batch * SEQLEN], dtype=torch.int32)


def answers(attend: Any, cu_seqlens: Tensor, group: Any = None, seed: int = 0) -> list[Tensor]:
    """This rank's output and gradients."""
    batch = int(cu_seqlens[-1]) // SEQLEN
    parts = [lhcp.shard(x, group) for x in qkv(SEQLEN, batch=batch, num_kv_heads=2, seed=seed)]
    leaves = [x.requires_grad_() for x in parts[:3]]
    out = attend(*leaves, cu_seqlens=cu_seqlens)
    return [out.detach(), *torch.autograd.grad(out, leaves, parts[3])]


def of_oracle(cu_seqlens: Tensor, mode: Mode = "lighthouse", seed: int = 0) -> list[Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        if mode == "lighthouse":
            return reference.lighthouse_attention(q, k, v, config=CONFIG, cu_seqlens=cu_seqlens)
        docs = documents(cu_seqlens, q.shape[0], SEQLEN)[:, None]
        return reference.causal_attention(q, k, v, docs=docs)

    return answers(attend, cu_seqlens, seed=seed)


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-11)


def test_one_graph_for_all_documents() -> None:
    """Fails if tracing breaks at the bounds, or a graph keeps those that it was traced with."""
    torch._dynamo.reset()
    layer = lhcp.LighthouseAttention(CONFIG)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    # The number of documents becomes a symbol at its first change.
    for i, cuts in enumerate(CUTS):
        with torch._dynamo.config.patch(error_on_recompile=i > 2):
            assert_same(answers(compiled, bounds(*cuts)), of_oracle(bounds(*cuts)))
    too_many = bounds(*range(2, 2 * CONFIG.picks + 2, 2))
    with pytest.raises(ValueError, match="5 windows of level 1"):
        answers(compiled, too_many)
    torch._dynamo.reset()


def compiled_across_ranks(group: Any) -> bool:
    torch._dynamo.reset()
    layer = lhcp.LighthouseAttention(CONFIG, group)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    same = True
    for cuts in CUTS[:2]:
        pair = (answers(attend, bounds(*cuts), group) for attend in (compiled, layer))
        same &= all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(*pair, strict=True))
    return same


@pytest.mark.slow
def test_one_graph_across_ranks(ranks: RankPool) -> None:
    assert ranks.run(compiled_across_ranks, 2) == [True, True]


def test_recomputed() -> None:
    """Fails if activation checkpointing meets other documents when it attends again."""
    layer = lhcp.LighthouseAttention(CONFIG)

    def attend(*qkv_: Tensor, cu_seqlens: Tensor) -> Tensor:
        out: Tensor = checkpoint(layer, *qkv_, cu_seqlens=cu_seqlens, use_reentrant=False)
        return out

    for cuts in CUTS[:2]:
        given = bounds(*cuts, batch=3)
        assert_same(answers(attend, given), of_oracle(given))


class Stack(nn.Module):
    """Layers one after another, which all read one tensor of bounds."""

    def __init__(self, group: Any = None, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(lhcp.LighthouseAttention(CONFIG, group) for _ in range(2))
        self.mix = nn.Parameter(torch.full((16,), 0.1, dtype=torch.float64))
        self.checkpointed = checkpointed

    def block(self, layer: nn.Module, *qkv_: Tensor, cu_seqlens: Tensor) -> Tensor:
        return qkv_[0] + self.mix * layer(*qkv_, cu_seqlens=cu_seqlens)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        for layer in self.layers:
            args, more = (layer, q, k, v), {"cu_seqlens": cu_seqlens}
            if self.checkpointed:
                q = checkpoint(self.block, *args, **more, use_reentrant=False)
            else:
                q = self.block(*args, **more)
        return q


STEPS = (CUTS[0], CUTS[3], CUTS[4], CUTS[0], CUTS[3])
"""The first and the last two lie alike, up to a power of two."""


def with_and_without_graphs(group: Any, mode: Mode, shared: bool) -> tuple[bool, int, set[str]]:
    """Train on other documents at each step; compare graphs with none, bit for bit."""
    found = []
    for by_graph in (False, True):
        stack = Stack(group, checkpointed=shared)
        for layer in stack.layers:
            layer.mode = mode
        graphs = with_graphs(stack, shared=shared) if by_graph else None
        steps = enumerate(STEPS)
        found.append([answers(stack, bounds(*cuts), group, seed) for seed, cuts in steps])
    assert graphs is not None and isinstance(graphs.recorder, Again)
    pairs = zip(*found, strict=True)
    same = all(
        torch.equal(a, b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True)
    )
    return same, graphs.recorder.recorded, set(graphs.eager)


@pytest.mark.parametrize(
    ("mode", "shared"),
    [("lighthouse", False), ("lighthouse", True), ("dense", False)],
)
def test_graphs_read_the_documents_of_their_step(mode: Mode, shared: bool) -> None:
    """Fails if a graph attends to the documents that it was recorded with."""
    same, recorded, eager = with_and_without_graphs(None, mode, shared)
    assert same and recorded > 0
    assert eager <= {"first calls", "more than 4 kinds of calls of one layer"}


def test_graphs_across_ranks(ranks: RankPool) -> None:
    """Fails if a replay sends what other documents need."""
    results = ranks.run(with_and_without_graphs, 2, "lighthouse", False)
    assert all(same and recorded for same, recorded, _ in results)
    assert results[0][1:] == results[1][1:]


def test_like_documents_share_a_graph() -> None:
    """Fails if each step records anew, though documents lie much as before."""
    layer = LighthouseAttention(CONFIG)
    graphs = with_graphs(layer)
    for i in range(5):
        given = bounds(33 + i, 70 + i)
        assert_same(answers(layer, given, seed=i), of_oracle(given, seed=i))
    # A forward twice, since the backward reads the documents.
    assert isinstance(graphs.recorder, Again) and graphs.recorder.recorded == 3
    assert graphs.eager == {"first calls": 2}


def test_one_document_has_the_bits_of_none() -> None:
    """Fails if what is kept apart costs a bit where there is nothing to.

    Rows that are whole documents are found on the host, so these are handed to the stages.
    """
    q, k, v, do = qkv(SEQLEN, batch=2, num_kv_heads=2)
    packing = read_packing(bounds(batch=2), 2, SEQLEN)
    one = packing.local(Cut(2, SEQLEN, 1, (0,)), q.device)
    choices = Choices(backend="math")
    results = []
    for given in (Given(), Given(documents=one)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        ranks = lhcp.LighthouseAttention(CONFIG).ranks
        out = sparse_attention(QKV(*leaves), CONFIG, ranks, choices, given)
        results.append([out, *torch.autograd.grad(out, leaves, do)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def padded(filler: float, cu_seqlens: Tensor | None) -> list[Tensor]:
    """Output and gradients of the real tokens, where the padding holds so much."""
    real = SEQLEN - 37
    parts = list(qkv(SEQLEN, num_kv_heads=2))
    for x in parts[:3]:
        x[:, real:] *= filler
    parts[3][:, real:] = 0
    leaves = [x.requires_grad_() for x in parts[:3]]
    valid = (torch.arange(SEQLEN) < real)[None]
    layer = lhcp.LighthouseAttention(CONFIG)
    out = layer(*leaves, valid=valid, cu_seqlens=cu_seqlens)
    return [x[:, :real] for x in (out.detach(), *torch.autograd.grad(out, leaves, parts[3]))]


@pytest.mark.parametrize("own", [True, False], ids=["a document", "part of the last"])
def test_padding_behind_documents(own: bool) -> None:
    """Fails if what padding holds moves a bit of a real token, selected or not."""
    cu_seqlens = bounds(9, 100, *([SEQLEN - 37] if own else []))
    for ours, theirs in zip(padded(0.0, cu_seqlens), padded(1e3, cu_seqlens), strict=True):
        assert torch.equal(ours, theirs)
