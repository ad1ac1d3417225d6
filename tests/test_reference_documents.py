"""The oracle with packed documents: nothing leaks, all is covered, one is the plain method."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lhcp import reference
from lhcp.reference_documents import check_documents, documents
from lhcp.testing.inputs import qkv, small_config

CONFIG, SEQLEN = small_config(num_strata=4, picks=4)
DILATED, _ = small_config(num_strata=4, picks=4, scorer="dilated", dilation=2)
CUTS = {
    "one": [],
    "aligned": [SEQLEN // 2],
    "odd": [7, 33, SEQLEN // 2 + 5],
    "short": [40, 41, 43, SEQLEN - 1],
    "at a window's end": [3, SEQLEN // 4 - 1],
}


def bounds(name: str, batch: int = 1) -> Tensor:
    """Documents of the first row as named; those of others begin a little later."""
    rows = [[0, *(min(c + r, SEQLEN - 1) for c in CUTS[name])] for r in range(batch)]
    starts = [row * SEQLEN + c for row, cuts in enumerate(rows) for c in cuts]
    return torch.tensor([*sorted(set(starts)), batch * SEQLEN], dtype=torch.int32)


def draw(batch: int = 1) -> tuple[Tensor, ...]:
    return qkv(SEQLEN, batch=batch, num_kv_heads=2)


@pytest.mark.parametrize("config", [CONFIG, DILATED], ids=["norm", "dilated"])
def test_one_document_is_the_plain_method(config: Any) -> None:
    """Fails if a rule of documents differs from the plain rule where there is one."""
    q, k, v, _ = draw(batch=2)
    plain = reference.lighthouse_attention(q, k, v, config=config)
    packed = reference.lighthouse_attention(q, k, v, config=config, cu_seqlens=bounds("one", 2))
    assert torch.allclose(plain, packed, rtol=1e-12, atol=1e-13)


def selected(
    q: Tensor, k: Tensor, v: Tensor, docs: Tensor, config: Any = CONFIG
) -> reference.ReferenceSelection:
    return reference.select(*reference.token_scores(q, k, v, config, docs=docs), config, docs)


@pytest.mark.parametrize("name", [name for name in CUTS if name != "one"])
def test_nothing_leaks(name: str) -> None:
    """Fails if an output or a gradient of a document moves with a token of another."""
    cu_seqlens = bounds(name)
    docs = documents(cu_seqlens, 1, SEQLEN)[0]
    q, k, v, do = draw()
    selection = selected(q, k, v, docs[None])

    def answer(changed: int | None) -> list[Tensor]:
        leaves = [x.clone() for x in (q, k, v)]
        if changed is not None:
            for x in leaves:
                x[:, changed] += 3
        leaves = [x.requires_grad_() for x in leaves]
        out = reference.lighthouse_attention(
            *leaves, config=CONFIG, selection=selection, cu_seqlens=cu_seqlens
        )
        return [out.detach(), *torch.autograd.grad(out, leaves, do)]

    before = answer(None)
    for first, stop in itertools.pairwise(cu_seqlens.tolist()):
        for token in {first, (first + stop) // 2, stop - 1}:
            moved = [
                (x != y).any(-1).any(-1)[0] for x, y in zip(before, answer(token), strict=True)
            ]
            assert not any(m[docs != docs[token]].any() for m in moved)
            # So that the test can fail: the output of the token's own document does move.
            assert moved[0][docs == docs[token]].any()


@pytest.mark.parametrize("name", list(CUTS))
def test_every_token_is_served_by_its_document(name: str) -> None:
    """Fails if a token has no output: a document's first tokens, or one whose window is mixed."""
    docs = documents(bounds(name, 2), 2, SEQLEN)
    q, k, v, _ = draw(batch=2)
    selection = selected(q, k, v, docs)
    ones = torch.ones_like(reference.gather(q, selection, CONFIG, docs))
    served = reference.scatter(ones, selection, SEQLEN, CONFIG, docs)
    assert served.min() >= 1
    first = reference.last_tokens(selection, CONFIG)
    for row in range(2):
        for head in range(2):
            alone = first[row, head][selection.levels[row, head] == 0].tolist()
            assert {t for t in range(SEQLEN) if t == 0 or docs[row, t] != docs[row, t - 1]} <= {
                *alone
            }
            # Entries stay in the order of their last tokens, so of their documents.
            assert first[row, head].diff().min() >= 0


def test_documents_of_whole_strata_are_as_alone() -> None:
    """Fails if a document's result depends on what it is packed with."""
    half = SEQLEN // 2
    q, k, v, _ = draw()
    packed = reference.lighthouse_attention(
        q, k, v, config=CONFIG, cu_seqlens=torch.tensor([0, half, SEQLEN])
    )
    config = dataclasses.replace(CONFIG, topk=CONFIG.topk // 2, num_strata=CONFIG.num_strata // 2)
    for part in (slice(0, half), slice(half, SEQLEN)):
        alone = reference.lighthouse_attention(q[:, part], k[:, part], v[:, part], config=config)
        assert torch.allclose(packed[:, part], alone, rtol=1e-12, atol=1e-13)


def test_dense_is_each_document_alone() -> None:
    """Fails if the mask of documents is off by one."""
    docs = documents(bounds("odd"), 1, SEQLEN)
    q, k, v, _ = draw()
    packed = reference.causal_attention(q, k, v, docs=docs[:, None])
    for first, stop in itertools.pairwise(bounds("odd").tolist()):
        part = slice(first, stop)
        alone = reference.causal_attention(q[:, part], k[:, part], v[:, part])
        assert torch.allclose(packed[:, part], alone, rtol=1e-12)


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([1, SEQLEN], "must ascend from 0"),
        ([0, SEQLEN - 1], f"must ascend from 0 to {SEQLEN}"),
        ([0, 9, 5, SEQLEN], "must ascend"),
        ([0, 9, 9, SEQLEN], "must ascend"),
    ],
)
def test_bounds_that_are_none(starts: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        documents(torch.tensor(starts), 1, SEQLEN)


def test_rows_begin_documents() -> None:
    with pytest.raises(ValueError, match="each of the 2 rows must begin a document"):
        documents(torch.tensor([0, SEQLEN + 1, 2 * SEQLEN]), 2, SEQLEN)


def test_too_many_documents_in_a_stratum() -> None:
    """Fails if a document's first token may be left without an entry."""
    picks = CONFIG.picks
    starts = [0, *(2 * i for i in range(1, picks + 1)), SEQLEN]
    docs = documents(torch.tensor(starts), 1, SEQLEN)
    said = rf"{picks + 1} windows of level 1 of stratum 0 of row 0.*topk >= {(picks + 1) * 4}"
    with pytest.raises(ValueError, match=said):
        check_documents(docs, CONFIG)
    check_documents(documents(torch.tensor([*starts[:-2], SEQLEN]), 1, SEQLEN), CONFIG)
