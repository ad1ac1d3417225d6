"""Packed documents in a batch: their forms, labels, positions and padding, and the layer's view."""

from typing import Any

import pytest
import torch
from torch import Tensor

import lhcp
from lhcp import reference
from lhcp.reference_documents import documents
from lhcp.testing.inputs import qkv
from lhcp.testing.ranks import RankPool
from tests.cases import together

N = 16
BOUNDS = torch.tensor([0, 3, 4, 16, 25, 32], dtype=torch.int32)
"""Two rows: documents of 3, 1 and 12 tokens, then of 9 and 7."""
IDS = documents(BOUNDS, 2, N)
PLACES = torch.cat([torch.arange(int(n)) for n in BOUNDS.diff()]).view(2, N)
TOKENS = torch.arange(2 * N).view(2, N) + 100


def shard(group: Any = None, pad_to: int | None = None, **more: Any) -> dict[str, Any]:
    batch = {"input_ids": TOKENS, "labels": TOKENS + 1000, **more}
    return lhcp.ContextParallel(group).shard(batch, pad_to=pad_to)


FORMS: dict[str, dict[str, Any]] = {
    "bounds": {"cu_seqlens": BOUNDS},
    "hugging face": {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS, "max_length_q": 12},
    "ids": {"document_ids": IDS % 2},
    "seq_idx": {"seq_idx": IDS},
}


@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_is_one(form: str) -> None:
    """Fails if a loader's form is read as other documents, or left for someone to read again."""
    found = shard(**FORMS[form])
    assert torch.equal(found["cu_seqlens"], BOUNDS) and found["cu_seqlens"].dtype == torch.int32
    kept = {"max_length_q"} & FORMS[form].keys()
    assert found.keys() == {"input_ids", "shift_labels", "position_ids", "cu_seqlens", *kept}


def test_no_label_is_of_the_next_document() -> None:
    """Fails if a loss would ask for a document's first token."""
    labels = shard(cu_seqlens=BOUNDS)["shift_labels"]
    asked = labels != -100
    assert torch.equal(labels[asked], TOKENS[asked] + 1001)
    assert torch.equal(asked[:, :-1], IDS[:, 1:] == IDS[:, :-1]) and not asked[:, -1].any()


def test_positions_are_global_or_restart() -> None:
    """Fails if positions that restart are refused beside their documents, or made where unasked."""
    assert torch.equal(shard(cu_seqlens=BOUNDS)["position_ids"], torch.arange(N)[None])
    found = shard(cu_seqlens=BOUNDS, position_ids=PLACES)
    assert torch.equal(found["position_ids"], PLACES)
    cu_seqlens = lhcp.cu_seqlens_from_position_ids(PLACES)
    assert torch.equal(shard(cu_seqlens=cu_seqlens, position_ids=PLACES)["cu_seqlens"], BOUNDS)
    own = lhcp.ContextParallel().positions(N, cu_seqlens=BOUNDS)
    assert torch.equal(own, PLACES)


def test_padding_is_a_document() -> None:
    """Fails if padded rows shift the documents after them, or padding belongs to the last one."""
    found = shard(pad_to=N + 4, cu_seqlens=BOUNDS)
    assert found["cu_seqlens"].tolist() == [0, 3, 4, 16, 20, 29, 36, 40]
    assert not found["valid"][:, N:].any() and (found["shift_labels"][:, N - 1 :] == -100).all()


def test_parts_of_a_batch_attend_inside_documents(ranks: RankPool) -> None:
    """Fails if what `shard` returns is not what a layer takes."""
    parts = ranks.run(attend, 2)
    q, k, v, _ = qkv(N, batch=2, num_kv_heads=2)
    expected = reference.causal_attention(q, k, v, docs=IDS[:, None])
    assert torch.allclose(together([o for o, _ in parts], "zigzag"), expected, atol=1e-12)
    assert torch.equal(together([p for _, p in parts], "zigzag"), PLACES)


def attend(group: Any) -> tuple[Tensor, Tensor]:
    cp = lhcp.ContextParallel(group)
    batch = shard(group, cu_seqlens=BOUNDS, position_ids=PLACES)
    q, k, v = (cp.shard(x) for x in qkv(N, batch=2, num_kv_heads=2)[:3])
    return cp.attention(None)(q, k, v, cu_seqlens=batch["cu_seqlens"]), batch["position_ids"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cu_seqlens": BOUNDS, "document_ids": IDS}, "cu_seqlens, document_ids: pass .* one form"),
        ({"cu_seq_lens_k": BOUNDS}, "cu_seq_lens_k: pass documents in one form"),
        ({"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS[:-1]}, "must be the same"),
        ({"cu_seqlens": BOUNDS[1:]}, "cu_seqlens goes from 3 to 32"),
        ({"cu_seqlens": BOUNDS, "position_ids": PLACES + 1}, "neither 0 to N - 1"),
    ],
    ids=lambda x: x[:12] if isinstance(x, str) else "",
)
def test_documents_that_are_none(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shard(**wrong)


def other_documents(group: Any) -> str:
    bounds = BOUNDS.clone()
    bounds[4] += group.rank()
    try:
        shard(group, cu_seqlens=bounds)
    except ValueError as error:
        return str(error)
    return "nothing said"


def test_ranks_with_other_documents_are_told(ranks: RankPool) -> None:
    for said in ranks.run(other_documents, 2):
        assert "batch['cu_seqlens']" in said or "batch['shift_labels']" in said


def sdpa_of_documents(group: Any) -> list[Tensor]:
    cp = lhcp.ContextParallel(group)
    parts = [cp.shard(x).requires_grad_() for x in qkv(N, batch=2, num_kv_heads=2)]
    q, k, v, dout = (x.transpose(1, 2) for x in parts)
    o = cp.sdpa(q, k, v, is_causal=True, enable_gqa=True, cu_seqlens=BOUNDS)
    o.backward(dout.detach())
    return [cp.unshard(x) for x in (o.transpose(1, 2), *(p.grad for p in parts[:3]))]


def test_sdpa_keeps_documents_apart(ranks: RankPool) -> None:
    """Fails if sdpa loses the bounds, forward or backward: torch's with a mask is the answer."""
    leaves = [x.requires_grad_() for x in qkv(N, batch=2, num_kv_heads=2)]
    q, k, v, dout = (x.transpose(1, 2) for x in leaves)
    same = (IDS[:, :, None] == IDS[:, None, :]).tril()[:, None]
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, same, enable_gqa=True)
    o.backward(dout.detach())
    expected = [o.transpose(1, 2), *(x.grad for x in leaves[:3])]
    for found in ranks.run(sdpa_of_documents, 2):
        for mine, want in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, want, rtol=0, atol=1e-12)
