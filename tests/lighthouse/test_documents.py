"""Documents in the local stages against the reference, whole and in chunks."""

import random

import pytest
import torch
from torch import Tensor

from lhcp import LighthouseConfig, reference
from lhcp.documents import Cut, Documents
from lhcp.lighthouse import gather, pool, scatter
from lhcp.lighthouse.documents import begin_documents, numbers_of
from lhcp.lighthouse.geometry import Geometry
from lhcp.lighthouse.norms import level_scores, token_scores
from lhcp.lighthouse.select import Selection, select
from lhcp.packing import read_packing
from lhcp.reference_documents import check_documents, documents
from lhcp.testing.inputs import qkv, small_config
from tests.lighthouse.test_stages import SIZE_IDS, SIZES, as_reference, in_chunks

BATCH = 3
SEEDS = [
    *range(2),
    *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3)),
    *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(4, 20)),
]


def random_documents(config: LighthouseConfig, seqlen: int, seed: int) -> Tensor:
    """Cuts anywhere, alone and in runs, as many as the strata still expand."""
    draw = random.Random(f"{config} {seed}")
    cuts = set(range(0, (BATCH + 1) * seqlen, seqlen))
    for _ in range(draw.randint(0, 40)):
        first = draw.randrange(BATCH * seqlen)
        more = cuts | {first + i for i in range(draw.choice([1, 1, 2, 5]))}
        found = torch.tensor(sorted(t for t in more if t <= BATCH * seqlen), dtype=torch.int32)
        try:
            check_documents(documents(found, BATCH, seqlen), config)
        except ValueError:
            continue
        cuts = set(found.tolist())
    return torch.tensor(sorted(cuts), dtype=torch.int32)


class Setting:
    """A small problem of 4 strata that is packed of random documents."""

    def __init__(self, size: tuple[int, int], seed: int) -> None:
        self.config, self.seqlen = small_config(*size, num_strata=4, picks=4)
        self.geom = Geometry.local(self.config, self.seqlen, 1, 1, 0)
        self.q, self.k, *_ = qkv(self.seqlen, batch=BATCH, num_kv_heads=2, head_dim=5, seed=seed)
        cu_seqlens = random_documents(self.config, self.seqlen, seed)
        self.docs = documents(cu_seqlens, BATCH, self.seqlen)
        cut = Cut(BATCH, self.seqlen, 1, (0,))
        packing = read_packing(cu_seqlens, BATCH, self.seqlen)
        self.own: Documents = packing.local(cut, self.q.device)
        self.positions = self.own.positions

    def selection(self) -> Selection:
        of_tokens = (token_scores(x, 2) for x in (self.q, self.k))
        scores = (level_scores(x, self.geom, self.positions) for x in of_tokens)
        return select(*scores, self.geom, self.positions)

    def random(self, length: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(BATCH, length, 4, 5, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", SIZES, ids=SIZE_IDS)
def test_stages_equal_the_reference(size: tuple[int, int], seed: int) -> None:
    """Fails if a token is counted in, or served by, an entry of another document."""
    s = Setting(size, seed)
    expected = torch.cat(reference.pool(s.q, s.config, s.docs)[1:], 1)
    assert torch.allclose(pool.pool(s.q, s.geom, s.positions), expected, rtol=1e-14, atol=1e-14)

    chosen = s.selection()
    scores = reference.token_scores(s.q, s.k, s.k, s.config, docs=s.docs)
    theirs = reference.select(*scores, s.config, s.docs)
    for ours, other in zip(as_reference(chosen, s.geom), theirs, strict=True):
        assert torch.equal(ours, other)
    last = reference.last_tokens(theirs, s.config)
    of_rows = s.docs[:, None].expand(-1, 2, -1).gather(2, last)
    assert torch.equal(numbers_of(chosen.entries, s.own.numbers, s.geom).long(), of_rows)

    x = s.q.clone().requires_grad_()
    sub = reference.gather(x, theirs, s.config, s.docs)
    dsub = s.random(s.geom.subsequence, seed)
    (dx,) = torch.autograd.grad(sub, x, dsub)
    got = gather.gather_backward_one(dsub, chosen.row_of_entry, s.geom, s.positions)
    assert torch.allclose(got, dx, rtol=1e-13, atol=1e-14)

    o = s.random(s.geom.subsequence, seed + 1).requires_grad_()
    out = reference.scatter(o, theirs, s.seqlen, s.config, s.docs)
    got = scatter.scatter(o.detach(), chosen.row_of_entry, s.geom, s.positions)
    assert torch.allclose(got, out, rtol=1e-14, atol=1e-14)
    dout = s.random(s.seqlen, seed + 2)
    (do,) = torch.autograd.grad(out, o, dout)
    got = scatter.scatter_backward(dout, chosen.entries, s.geom, s.positions)
    assert torch.allclose(got, do, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num_chunks", [2, 4])
@pytest.mark.parametrize("size", SIZES, ids=SIZE_IDS)
def test_chunks_that_exchange_rows_equal_one_chunk(
    size: tuple[int, int], num_chunks: int, seed: int
) -> None:
    """Fails if a chunk takes what it is owed for a token of another document, or leaves some."""
    s = Setting(size, seed)
    chosen, cut = s.selection(), in_chunks(s.geom, num_chunks)
    maps = (chosen.entries, chosen.row_of_entry)
    o = s.random(s.geom.subsequence, seed)
    out = scatter.scatter(o, maps[1], cut, s.positions)
    owed = scatter.last_rows(o, maps[1], cut)
    halo = torch.cat([torch.zeros_like(owed[:, :1]), owed[:, :-1]], 1)
    scatter.scatter_edges(out, o, maps[1], halo, cut, s.positions)
    assert torch.equal(out, scatter.scatter(o, maps[1], s.geom, s.positions))

    dout = s.random(s.seqlen, seed + 1)
    do = scatter.scatter_backward(dout, maps[0], cut, s.positions)
    grads = scatter.edge_grads(dout, cut, s.positions)
    received = torch.cat([grads[:, 1:], torch.zeros_like(grads[:, :1])], 1)
    scatter.add_last_grads(do, dout, received, maps[1], cut)
    whole = scatter.scatter_backward(dout, maps[0], s.geom, s.positions)
    assert torch.allclose(do, whole, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", SIZES, ids=SIZE_IDS)
def test_coverage(size: tuple[int, int], seed: int) -> None:
    """Fails if a token is served by nobody, or a document's first token is no entry."""
    s = Setting(size, seed)
    chosen = s.selection()
    ones = torch.ones(BATCH, s.geom.subsequence, 2, 1, dtype=torch.float64)
    fan_in = scatter.scatter(ones, chosen.row_of_entry, s.geom, s.positions)
    assert fan_in.min() >= 1 and fan_in.max() <= s.geom.num_levels
    for level in range(1, s.geom.num_levels):
        # An entry is expanded where its first child is in the sub-sequence.
        below = slice(s.geom.offset(level - 1), s.geom.offset(level))
        expanded = chosen.row_of_entry[..., below][..., :: s.geom.pool_factor] >= 0
        start = s.geom.offset(level) - s.geom.num_tokens
        columns = slice(start, start + s.geom.level_size(level))
        forced = begin_documents(s.positions, s.geom)[:, None, columns]
        assert bool(expanded[forced.expand_as(expanded)].all())
