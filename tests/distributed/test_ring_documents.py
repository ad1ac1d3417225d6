"""Dense attention of packed documents across ranks, against the oracle of the whole sequence."""

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import lhcp
from lhcp import reference
from lhcp.comm.layout import LayoutName
from lhcp.comm.mesh import as_ranks
from lhcp.documents import Cut, number_tokens
from lhcp.layer.choices import Choices
from lhcp.layer.plan import carry_out, make_plan
from lhcp.reference_documents import documents
from lhcp.ring.documents import PackedRows
from lhcp.ring.shape import Mask
from lhcp.testing.inputs import qkv
from lhcp.testing.ranks import RankPool
from lhcp.testing.tolerance import assert_close_float64, assert_within_budget
from lhcp.timing import UNTIMED
from tests.cases import LAYOUTS, ROTATIONS, TWO_AXES, covering, serves, together

Results = tuple[Tensor, ...]
NAMES = ("o", "dq", "dk", "dv", "lse")


def starts(kind: str, seqlen: int, chunk: int) -> set[int]:
    """First tokens of the documents of one row, but the row's own."""
    edges = range(chunk, seqlen, chunk)
    found = {
        "one": set[int](),
        "at edges": set(edges),
        "before edges": {edge - 1 for edge in edges},
        "after edges": {edge + 1 for edge in edges},
        "of one token": {t for edge in edges for t in (edge - 1, edge, edge + 1)},
        "long": {seqlen // 3, seqlen - 1},
        "all of one token": set(range(seqlen)),
    }
    if kind in found:
        return found[kind]
    generator = random.Random(f"{kind} {seqlen}")
    return set(generator.sample(range(seqlen), min(seqlen, 1 + seqlen // 6)))


KINDS = ("one", "at edges", "before edges", "after edges", "of one token", "long")
KINDS += ("all of one token", "random 0", "random 1", "random 2")
SHORT = "short"
"""Documents of three tokens at most, in all rows and heads: parts of chunks meet."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """One dense attention of packed documents."""

    world_size: int
    layout: LayoutName = "zigzag"
    rotation: str = "p2p"
    backend: str = "cpu"
    chunk: int = 6
    """Tokens of a chunk if there are two a rank: N / (2 W)."""
    batch: int = 1
    num_kv_heads: int = 2
    groups: int = 1
    causal: bool = True
    kind: str = "random 0"
    per_head: bool = False
    """Each kv head has documents of its own, as entries of a selection have."""
    dtype: torch.dtype = torch.float64

    @property
    def seqlen(self) -> int:
        return 2 * self.world_size * self.chunk

    @property
    def num_nodes(self) -> int | None:
        return TWO_AXES[self.rotation][self.world_size][0] if self.rotation in TWO_AXES else None

    def inputs(self) -> tuple[Tensor, ...]:
        heads = self.num_kv_heads * self.groups
        sizes: dict[str, Any] = {"num_heads": heads, "num_kv_heads": self.num_kv_heads}
        return qkv(self.seqlen, batch=self.batch, dtype=self.dtype, seed=self.chunk, **sizes)

    def cu_seqlens(self, head: int = 0) -> Tensor:
        """Rows differ: each takes the kind after the one before's."""
        found = []
        for row in range(self.batch):
            if self.kind == SHORT:
                of_row = {0} | set(range(1 + (row + head) % 3, self.seqlen, 3))
            else:
                kind = KINDS[(KINDS.index(self.kind) + row + 3 * head) % len(KINDS)]
                of_row = {0} | starts(kind, self.seqlen, self.chunk)
            found += [row * self.seqlen + t for t in sorted(of_row) if t < self.seqlen]
        return torch.tensor([*found, self.batch * self.seqlen], dtype=torch.int32)

    def numbers(self) -> Tensor:
        """The oracle's documents of the tokens, [B, Hk or 1, N]."""
        heads = range(self.num_kv_heads if self.per_head else 1)
        each = [documents(self.cu_seqlens(h), self.batch, self.seqlen) for h in heads]
        return torch.stack(each, 1)

    def __str__(self) -> str:
        words = [f"W{self.world_size}", self.layout, self.rotation, self.backend, self.kind]
        words += [f"n{self.chunk}B{self.batch}H{self.num_kv_heads}G{self.groups}"]
        words += [] if self.causal else ["full"]
        return "-".join(words + (["heads"] if self.per_head else []))


def expected(case: Packed, dtype: torch.dtype = torch.float64) -> Results:
    """The oracle's results; of a call that is not causal, each document's own attention."""
    q, k, v, do = (x.to(dtype) for x in case.inputs())
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    heads, groups = q.shape[2], case.groups
    docs = case.numbers().expand(-1, case.num_kv_heads, -1).repeat_interleave(groups, 1)
    hidden = docs[..., :, None] != docs[..., None, :]
    if case.causal:
        hidden = hidden | torch.ones(hidden.shape[2:], dtype=torch.bool).triu(1)
    whole_k, whole_v = (x.repeat_interleave(groups, 2) for x in leaves[1:])
    logits = torch.einsum("bqhd,bkhd->bhqk", leaves[0], whole_k) * q.shape[3] ** -0.5
    logits = logits.masked_fill(hidden, -torch.inf)
    if case.causal:
        out = reference.causal_attention(*leaves, docs=docs)
    else:
        out = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), whole_v)
    assert docs.shape[1] == heads
    return (out.detach(), *torch.autograd.grad(out, leaves, do), logits.logsumexp(-1).detach())


def answer(group: Any, case: Packed) -> Results:
    """This rank's o, dq, dk, dv and lse, by the public function; by the ring's for `per_head`."""
    q, k, v, do = (lhcp.shard(x, group, layout=case.layout) for x in case.inputs())
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    if case.per_head:
        ranks, mask = as_ranks(group), Mask(case.causal)
        plan = make_plan(q, k, ranks, Choices(case.layout, case.rotation, case.backend), mask)
        cut = Cut(case.batch, case.seqlen, plan.layout.num_chunks, (0,))
        cuts = [case.cu_seqlens(head)[:-1].long() for head in range(case.num_kv_heads)]
        limits = [number_tokens(cut_, cut, q.device).limits for cut_ in cuts]
        packed = PackedRows(case.numbers().int(), torch.stack(limits).amax(0))
        o, lse = carry_out(q, k, v, plan, UNTIMED, packed, with_lse=True)
    else:
        o, lse = lhcp.ring_attention(
            q,
            k,
            v,
            group=group,
            layout=case.layout,
            rotation=case.rotation,
            backend=case.backend,
            causal=case.causal,
            cu_seqlens=case.cu_seqlens(),
            return_lse=True,
        )
    return (o.detach(), *torch.autograd.grad(o, (q, k, v), do), lse)


def whole(ranks: RankPool, case: Packed) -> Results:
    if case.world_size == 1:
        return answer(None, case)
    parts = ranks.run(answer, case.world_size, case, num_nodes=case.num_nodes)
    return tuple(
        together([part[i] for part in parts], case.layout, dim=2 if i == 4 else 1) for i in range(5)
    )


FACTORS: dict[str, tuple[Any, ...]] = {
    "world_size": (1, 2, 3, 4),
    "layout": LAYOUTS,
    "rotation": ROTATIONS,
    "backend": ("cpu", "math"),
    "chunk": (1, 5, 12),
    "batch": (1, 3),
    "num_kv_heads": (1, 2, 3, 4),
    "groups": (1, 2, 3),
    "kind": KINDS,
    "per_head": (False, True),
    "causal": (True, True, True, False),
}


def fits(choice: dict[str, Any]) -> bool:
    world_size = choice["world_size"]
    if world_size == 1:
        return bool(choice["rotation"] == "p2p")
    heads = choice["num_kv_heads"] * choice["groups"]
    return serves(choice["rotation"], world_size, heads)


CASES = [Packed(**choice) for choice in covering(FACTORS, fits)]
CASES += [
    Packed(
        world_size=world_size,
        layout=layout,
        rotation=rotation,
        backend=("cpu", "math")[per_head],
        chunk=7,
        batch=2,
        num_kv_heads=4,
        groups=3,
        kind=SHORT,
        per_head=per_head,
    )
    for world_size in (2, 3, 4)
    for layout in LAYOUTS
    for rotation in ("p2p", "hybrid", "hybrid_context_first")
    for per_head in (False, True)
    if serves(rotation, world_size, 12)
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle(ranks: RankPool, case: Packed) -> None:
    """Fails if a token sees another document, or misses a key of its own."""
    for name, ours, theirs in zip(NAMES, whole(ranks, case), expected(case), strict=True):
        assert_close_float64(name, ours, theirs)


def before_and_after(group: Any, case: Packed, token: int) -> tuple[Results, Results]:
    """This rank's results without and with a change of one token of row 0, of q, k and v."""
    q, k, v, do = case.inputs()
    answers = []
    for change in (0.0, 3.0):
        leaves = []
        for x in (q, k, v):
            x = x.clone()
            x[0, token] += change
            leaves.append(lhcp.shard(x, group, layout=case.layout).requires_grad_())
        o = lhcp.ring_attention(
            *leaves,
            group=group,
            layout=case.layout,
            rotation=case.rotation,
            backend=case.backend,
            cu_seqlens=case.cu_seqlens(),
        )
        own = lhcp.shard(do, group, layout=case.layout)
        answers.append((o.detach(), *torch.autograd.grad(o, leaves, own)))
    return answers[0], answers[1]


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("backend", ["cpu", "math"])
def test_nothing_leaks(ranks: RankPool, backend: str, rotation: str) -> None:
    """Fails if one bit of an output or a gradient moves with a token of another document."""
    case = Packed(world_size=4, rotation=rotation, backend=backend, num_kv_heads=4, batch=2)
    docs = case.numbers()[0, 0]
    edge = int((docs.diff() != 0).nonzero()[2]) + 1
    for token in (edge, edge - 1, case.seqlen - 1):
        parts = ranks.run(before_and_after, 4, case, token, num_nodes=case.num_nodes)
        other = docs != docs[token]
        for i in range(4):
            before, after = (together([p[j][i] for p in parts], case.layout) for j in range(2))
            moved = (before != after).flatten(2).any(2)
            assert not moved[1].any() and not moved[0][other].any()
            # So that the test can fail: the document itself does move.
            assert moved[0][~other].any()


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_low_precision_is_within_budget(ranks: RankPool, rotation: str) -> None:
    """Fails if results of rows that see no key of a call cost precision in the merge."""
    case = Packed(
        world_size=4, rotation=rotation, num_kv_heads=4, groups=2, chunk=16, dtype=torch.bfloat16
    )
    got = whole(ranks, case)
    same_dtype, exact = expected(case, torch.bfloat16), expected(case)
    for name, ours, theirs, truth in zip(NAMES[:4], got, same_dtype, exact, strict=False):
        assert ours.dtype == torch.bfloat16 and ours.isfinite().all()
        lse_eps = torch.finfo(torch.float32).eps * exact[4].abs().max().item()
        assert_within_budget(name, ours, theirs, truth, lse_eps * truth.abs().max().item())


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_a_document_a_row_is_no_documents(ranks: RankPool, rotation: str) -> None:
    """Fails if rows that are whole documents cost other messages, calls or bits."""
    case = Packed(world_size=4, rotation=rotation, num_kv_heads=4, batch=2)
    assert all(ranks.run(as_without, 4, case, num_nodes=case.num_nodes))


def as_without(group: Any, case: Packed) -> bool:
    answers = []
    rows = torch.arange(case.batch + 1, dtype=torch.int32) * case.seqlen
    for cu_seqlens in (None, rows):
        q, k, v, do = (lhcp.shard(x, group, layout=case.layout) for x in case.inputs())
        leaves = [x.requires_grad_() for x in (q, k, v)]
        o = lhcp.ring_attention(*leaves, group=group, rotation=case.rotation, cu_seqlens=cu_seqlens)
        answers.append((o, *torch.autograd.grad(o, leaves, do)))
    return all(torch.equal(*pair) for pair in zip(*answers, strict=True))
