"""Packed documents by each backend of a GPU: the whole, every rank's calls, and no leak."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lhcp
from lhcp import reference
from lhcp.comm.layout import make_layout
from lhcp.comm.mesh import Ranks
from lhcp.documents import Cut, limits_of
from lhcp.layer.choices import Choices
from lhcp.layer.plan import carry_out, make_plan
from lhcp.precision import wide
from lhcp.reference_documents import documents
from lhcp.ring.block import BLOCKS
from lhcp.ring.block.base import BackwardInputs
from lhcp.ring.documents import Cuts, PackedRows
from lhcp.ring.kv import KV
from lhcp.ring.merge.merge import add, merge
from lhcp.ring.merge.partial import Partial
from lhcp.ring.schedule import allgather_steps
from lhcp.ring.shape import AttentionShape, Mask
from lhcp.testing.inputs import qkv
from lhcp.testing.tolerance import assert_within_budget
from lhcp.timing import UNTIMED

BACKENDS = [name for name, block in BLOCKS.items() if block.packed and "cuda" in block.devices]
SEQLEN = 1024
NAMES = ("o", "dq", "dk", "dv")
CUTS = {
    "random": sorted(random.Random(0).sample(range(1, SEQLEN), 12)),
    # Chunks of 8 are 128: documents that end at, just before and just after an edge, of one token,
    # and one over many chunks.
    "edges": [127, 128, 129, 255, 257, 384, 900, 1023],
    "of one token": list(range(1, SEQLEN)),
    "long": [1000],
}


def usable(backend: str) -> None:
    if (why := BLOCKS[backend].missing) is not None:
        pytest.skip(why)


def bounds(name: str, batch: int) -> Tensor:
    """Rows take the cuts of the name, and of those after it."""
    names = list(CUTS)
    rows = [CUTS[names[(names.index(name) + row) % len(names)]] for row in range(batch)]
    starts = [row * SEQLEN + s for row, cuts in enumerate(rows) for s in (0, *cuts)]
    return torch.tensor([*starts, batch * SEQLEN], dtype=torch.int32)


def draw(batch: int, groups: int, head_dim: int = 64) -> tuple[Tensor, ...]:
    return qkv(
        SEQLEN,
        batch=batch,
        num_heads=2 * groups,
        num_kv_heads=2,
        head_dim=head_dim,
        dtype=torch.bfloat16,
        device="cuda",
    )


def oracle(inputs: tuple[Tensor, ...], docs: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Output and gradients for documents [B, 1 or Hk, N]."""
    q, k, v, do = (x.detach().to(dtype) for x in inputs)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    of_heads = docs.expand(-1, k.shape[2], -1).repeat_interleave(q.shape[2] // k.shape[2], 1)
    out = reference.causal_attention(*leaves, docs=of_heads.to(q.device))
    return (out.detach(), *torch.autograd.grad(out, leaves, do))


def check(got: tuple[Tensor, ...], inputs: tuple[Tensor, ...], docs: Tensor) -> None:
    same, exact = (oracle(inputs, docs, dtype) for dtype in (inputs[0].dtype, torch.float64))
    for name, *results in zip(NAMES, got, same, exact, strict=True):
        assert_within_budget(name, *results)


def answer(attend: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:3]]
    out = attend(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, inputs[3]))


@pytest.mark.parametrize("name", list(CUTS))
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_sequences(backend: str, groups: int, name: str) -> None:
    usable(backend)
    inputs, cu_seqlens = draw(2, groups), bounds(name, 2)
    docs = documents(cu_seqlens, 2, SEQLEN)[:, None]
    for given in (cu_seqlens, cu_seqlens.cuda()):
        got = answer(
            lambda *x, given=given: lhcp.ring_attention(*x, backend=backend, cu_seqlens=given),
            inputs,
        )
        check(got, inputs, docs)


@pytest.mark.parametrize("head_dim", [96, 128])
@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_with_documents_of_their_own(backend: str, head_dim: int) -> None:
    """As the entries of a selection have."""
    usable(backend)
    inputs = draw(2, 2, head_dim)
    each = [bounds(name, 2) for name in ("random", "edges")]
    numbers = torch.stack([documents(cu, 2, SEQLEN) for cu in each], 1)
    packed = PackedRows(numbers.int().cuda(), limits(each, 1))
    plan = make_plan(inputs[0], inputs[1], Ranks(), Choices(backend=backend), packed=True)
    got = answer(lambda *x: carry_out(*x, plan, UNTIMED, packed)[0], inputs)
    check(got, inputs, numbers)


def limits(each: list[Tensor], num_chunks: int, batch: int = 2) -> Tensor:
    cut = Cut(batch, SEQLEN, num_chunks, (0,))
    return torch.stack([limits_of(cu[:-1].long(), cut) for cu in each]).amax(0)


def by_calls(inputs: tuple[Tensor, ...], numbers: Tensor, limit: Tensor, backend: str, world: int):
    """Output and gradients from the calls of all ranks, one after another: no messages."""
    q, k, v, do = inputs
    layout, packed = make_layout("zigzag", world), BLOCKS[backend].packed
    assert packed is not None
    shape = AttentionShape(
        seqlen=SEQLEN,
        layout=layout,
        num_heads=q.shape[2],
        num_kv_heads=k.shape[2],
        head_dim=q.shape[3],
        batch=q.shape[0],
        mask=Mask(True, *limit.tolist()),
    )
    chunk, scale = shape.chunk, q.shape[3] ** -0.5

    def rows(x: Tensor, chunks: tuple[int, ...] | list[int], dim: int = 1) -> Tensor:
        return torch.cat([x.narrow(dim, c * chunk, chunk) for c in chunks], dim)

    def fold(x: Tensor, call) -> Tensor:
        return x.unflatten(1, (-1, chunk)).flatten(0, 1) if call.per_chunk else x

    def unfold(x: Tensor, call) -> Tensor:
        return x.unflatten(0, (q.shape[0], -1)).flatten(1, 2) if call.per_chunk else x

    out, grads = torch.zeros_like(q), [torch.zeros_like(x, dtype=wide(x.dtype)) for x in (q, k, v)]
    for rank in range(world):
        mine, cuts = layout.chunks(rank), Cuts(numbers, shape, rank)
        calls = [(call, step) for step in allgather_steps(shape, rank) for call in step.calls]
        parts, given = [], []
        for call, step in calls:
            own, keys = mine[slice(*call.q)], sorted(step.keys[slice(*call.kv)])
            kv = KV(*(fold(rows(x, keys), call) for x in (k, v)))
            at = (call.q[0] * chunk, call.q[1] * chunk)
            cut = cuts.bounds(call, step)
            o, lse = packed.forward(fold(rows(q, own), call), kv, call.mask, cut, scale)
            if call.per_chunk:
                lse = lse.unflatten(0, (q.shape[0], -1)).transpose(1, 2).flatten(2)
            parts.append(Partial(at, (0, q.shape[2]), unfold(o, call), lse))
            given.append((call, own, keys, kv, at, cut))
        merged = torch.empty_like(rows(q, mine))
        lse = merged.new_empty((q.shape[0], q.shape[2], merged.shape[1]), dtype=wide(q.dtype))
        merge(merged, lse, parts)
        partial_dq = []
        for call, own, keys, kv, at, cut in given:
            of_lse = lse[:, :, slice(*at)]
            if call.per_chunk:
                of_lse = of_lse.unflatten(2, (len(own), -1)).transpose(1, 2).flatten(0, 1)
            mine_now = [fold(x, call) for x in (rows(do, own), rows(q, own))]
            of_out = fold(merged[:, slice(*at)], call)
            given_now = BackwardInputs(*mine_now, kv, of_out, of_lse.contiguous())
            dq, dk, dv = packed.backward(given_now, call.mask, cut, scale)
            partial_dq.append(Partial(at, (0, q.shape[2]), unfold(dq, call)))
            for total, x in zip(grads[1:], (dk, dv), strict=True):
                for i, c in enumerate(keys):
                    of_chunk = unfold(x, call)[:, i * chunk : (i + 1) * chunk]
                    total[:, c * chunk : (c + 1) * chunk] += of_chunk
        own_dq = torch.empty_like(merged)
        add(own_dq, partial_dq)
        for i, c in enumerate(mine):
            at_chunk = slice(i * chunk, (i + 1) * chunk)
            out[:, c * chunk : (c + 1) * chunk] = merged[:, at_chunk]
            grads[0][:, c * chunk : (c + 1) * chunk] = own_dq[:, at_chunk]
    return (out, *(x.to(q.dtype) for x in grads))


@pytest.mark.parametrize("per_head", [False, True], ids=["shared", "heads"])
@pytest.mark.parametrize("name", list(CUTS))
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_calls_of_four_ranks(backend: str, name: str, per_head: bool) -> None:
    """Fails if a kernel leaves what no key meets unwritten, or reads keys of an empty run."""
    usable(backend)
    inputs = draw(2, 2)
    each = [bounds(name, 2), bounds("random", 2)][: 1 + per_head]
    numbers = torch.stack([documents(cu, 2, SEQLEN) for cu in each], 1)
    got = by_calls(inputs, numbers.int().cuda(), limits(each, 8), backend, 4)
    check(got, inputs, numbers)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_leaks(backend: str) -> None:
    """Fails if one bit of another document moves with a token."""
    usable(backend)
    inputs, cu_seqlens = draw(1, 2), bounds("random", 1)
    docs = documents(cu_seqlens, 1, SEQLEN)[0].cuda()
    token = int(cu_seqlens[5])

    def results(change: float) -> tuple[Tensor, ...]:
        q, k, v = (x.clone() for x in inputs[:3])
        for x in (q, k, v):
            x[:, token] += change
        attend = lambda *x: lhcp.ring_attention(*x, backend=backend, cu_seqlens=cu_seqlens)  # noqa: E731
        return answer(attend, (q, k, v, inputs[3]))

    before, after = results(0.0), results(3.0)
    for a, b in zip(before, after, strict=True):
        moved = (a != b).flatten(2).any(2)[0]
        assert not moved[docs != docs[token]].any() and moved[docs == docs[token]].any()


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_kept_serves_every_layer(backend: str) -> None:
    """Fails if bounds that a first layer made are written over, or others', when a later one reads
    them."""
    usable(backend)
    inputs, kept = draw(2, 2), bounds("random", 2).cuda()
    layers = [lhcp.LighthouseAttention(None, backend=backend) for _ in range(3)]
    found = [answer(lambda *x, of=of: of(*x, cu_seqlens=kept), inputs) for of in layers]
    fresh = answer(lambda *x: layers[0](*x, cu_seqlens=kept.clone()), inputs)
    for results in found:
        assert all(map(torch.equal, results, fresh))


def test_auto_takes_a_backend_that_can() -> None:
    inputs, cu_seqlens = draw(1, 1), bounds("random", 1)
    check(
        answer(lambda *x: lhcp.ring_attention(*x, cu_seqlens=cu_seqlens), inputs),
        inputs,
        documents(cu_seqlens, 1, SEQLEN)[:, None],
    )
    with pytest.raises(ValueError, match=r"backend='cudnn': .*cu_seqlens.*backends that can: "):
        lhcp.ring_attention(*inputs[:3], backend="cudnn", cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("mode", ["lighthouse", "dense"])
def test_graphs_take_new_documents(mode: str) -> None:
    """Fails if a CUDA graph keeps the documents that it was recorded with."""
    config = lhcp.LighthouseConfig.fit(SEQLEN, 1)
    plain, layer = (lhcp.LighthouseAttention(config) for _ in range(2))
    plain.mode = layer.mode = mode  # type: ignore[assignment]
    lhcp.graphed(layer, always=True)
    inputs = draw(1, 2)
    # Equal limits, so one recording; then others.
    for cuts in [[100, 600]] * 4 + [[200, 700], [512], [31, 300]]:
        cu_seqlens = torch.tensor([0, *cuts, SEQLEN], dtype=torch.int32)
        got, wanted = (
            answer(lambda *x, of=of: of(*x, cu_seqlens=cu_seqlens), inputs)  # noqa: B023
            for of in (layer, plain)
        )
        for ours, theirs in zip(got, wanted, strict=True):
            assert torch.allclose(ours.float(), theirs.float(), atol=2e-2)
