"""Blocks whose calls documents cut: against attention of each run alone, and what kernels get."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lhcp.layer.plan import choose_backend
from lhcp.ring.block import BLOCKS, packages, torch_ops
from lhcp.ring.block.base import BackwardInputs, Bounds, Request
from lhcp.ring.kv import KV
from lhcp.ring.shape import CAUSAL, FULL, Mask
from lhcp.testing.inputs import qkv
from lhcp.testing.tolerance import assert_close_float64
from tests.cases import dense_reference, strided

HERE = [
    name
    for name, block in BLOCKS.items()
    if block.missing is None and block.refuses(Request(torch.float64, 8, "cpu")) is None
]
SEQLEN, BATCH, HEADS = 12, 2, 2

# Runs of queries and keys of each batch row, and of each kv head: a call of own keys, whose runs
# are the same, and one of a rectangle. Some are of one row, some empty, some without keys.
OWN = [[0, 0, 4, 5, 12], [0, 12, 12, 12, 12], [0, 1, 2, 3, 12], [0, 5, 5, 11, 12]]
ROWS = [[0, 0, 5, 12], [0, 0, 0, 12], [0, 0, 12, 12], [0, 0, 1, 12]]
KEYS = [[0, 3, 8, 8], [0, 8, 8, 8], [0, 0, 8, 8], [0, 7, 8, 8]]


def end_to_end(runs: list[list[int]], length: int) -> Tensor:
    """Bounds of segments laid end to end."""
    edges = [i * length + edge for i, of in enumerate(runs) for edge in of[1:]]
    return torch.tensor([0, *edges], dtype=torch.int32)


def problem(causal: bool, per_head: bool) -> tuple[Bounds, list[list[int]], list[list[int]], int]:
    """The bounds of a call, its runs, and how many keys it has."""
    num_keys = SEQLEN if causal else 8
    rows, keys = (OWN, OWN) if causal else (ROWS, KEYS)
    count = BATCH * HEADS if per_head else BATCH
    edges = end_to_end(rows[:count], SEQLEN), end_to_end(keys[:count], num_keys)
    return Bounds(*edges, SEQLEN, num_keys, per_head), rows, keys, num_keys


def run_by_run(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, per_head: bool
) -> tuple[Tensor, Tensor]:
    """Each run alone, head by head; 0 and -inf where a query has no keys."""
    _, rows, keys, _ = problem(causal, per_head)
    groups = q.shape[2] // k.shape[2]
    out = torch.zeros_like(q)
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf)
    for b in range(BATCH):
        for h in range(HEADS):
            of = b * HEADS + h if per_head else b
            heads = slice(h * groups, (h + 1) * groups)
            for i in range(len(rows[of]) - 1):
                at, seen = slice(*rows[of][i : i + 2]), slice(*keys[of][i : i + 2])
                if at.start == at.stop or seen.start == seen.stop:
                    continue
                one = (x[b : b + 1, seen, h : h + 1] for x in (k, v))
                o, of_lse = dense_reference(q[b : b + 1, at, heads], *one, causal, 0.4)
                out = out.index_put(
                    (
                        torch.tensor(b),
                        torch.arange(*at.indices(SEQLEN))[:, None],
                        torch.arange(heads.start, heads.stop),
                    ),
                    o[0],
                )
                lse[b, heads, at] = of_lse[0].detach()
    return out, lse


@pytest.mark.parametrize("per_head", [False, True], ids=["shared", "heads"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("groups", [1, 3], ids=lambda g: f"G{g}")
@pytest.mark.parametrize("backend", HERE)
def test_runs_are_as_alone(backend: str, groups: int, causal: bool, per_head: bool) -> None:
    """Fails if a run sees another's keys, or a row without keys is not 0, -inf or has grads."""
    bounds, _, _, num_keys = problem(causal, per_head)
    q, _, _, do = qkv(SEQLEN, batch=BATCH, num_heads=HEADS * groups, num_kv_heads=HEADS, head_dim=7)
    _, k, v, _ = qkv(num_keys, batch=BATCH, num_kv_heads=HEADS, head_dim=7, seed=1)
    packed, kv, mask = BLOCKS[backend].packed, KV(k, v), Mask(causal)
    assert packed is not None
    out, lse = packed.forward(strided(q), kv.map(strided), mask, bounds, 0.4)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = run_by_run(*leaves, causal, per_head)
    assert_close_float64("out", out, expected)
    seen = expected_lse > -torch.inf
    assert torch.equal(lse == -torch.inf, ~seen) and bool((~seen).any()) != causal
    assert_close_float64("lse", lse[seen], expected_lse[seen])
    # As in a ring, where every query has met its own key: a lse that is finite.
    merged = lse.where(seen, 0.3)
    grads = packed.backward(BackwardInputs(strided(do), q, kv, out, merged), mask, bounds, 0.4)
    for name, ours, theirs in zip(
        ("dq", "dk", "dv"), grads, torch.autograd.grad(expected, leaves, do), strict=True
    ):
        assert_close_float64(name, ours, theirs)


CUDA = ["flash", "flash_attn", "fa4"]


class Kernels:
    """Stands in for the kernels of a GPU: computes by "cpu" and keeps what it was told."""

    def __init__(self) -> None:
        self.said: list[dict[str, Any]] = []
        self._cpu = torch_ops._cpu_varlen_forward, torch_ops._cpu_varlen_backward

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **said: Any) -> tuple[Tensor, Tensor]:
        """As flash-attn: out, and lse that is inf where there was no key."""
        bounds, mask, scale = self._read(said)
        out, lse = self._cpu[0](q, KV(k, v), mask, bounds, scale)
        if "out" in said:
            used = said["seqused_q"]
            assert (used == bounds.q.diff().where(bounds.kv.diff() > 0, 0)).all()
            said["out"].copy_(out)
            said["lse"].copy_(lse)
            return said["out"], said["lse"]
        return out, lse.where(lse > -torch.inf, torch.inf).float()

    def backward(self, *tensors: Tensor, **said: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(dout, q, k, v, out, lse) -> dq, dk, dv."""
        bounds, mask, scale = self._read(said)
        dout, q, k, v, out, lse = tensors[:6]
        return self._cpu[1](BackwardInputs(dout, q, KV(k, v), out, lse), mask, bounds, scale)

    def _read(self, said: dict[str, Any]) -> tuple[Bounds, Mask, float]:
        self.said.append(said)
        lengths = said["max_seqlen_q"], said["max_seqlen_k"]
        bounds = Bounds(said["cu_seqlens_q"], said["cu_seqlens_k"], *lengths, False)
        assert int(bounds.q.diff().max()) <= lengths[0]
        assert int(bounds.kv.diff().max()) <= lengths[1]
        return bounds, Mask(said["causal"]), said["softmax_scale"]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """The packages' and torch's varlen entries, with the arguments that they have."""
    them = Kernels()

    def fa2_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, **said):  # type: ignore
        for into, x in zip(
            (dq, dk, dv), them.backward(dout, q, k, v, out, softmax_lse, **said), strict=True
        ):
            into.copy_(x)

    def fa4_backward(q, k, v, out, dout, lse, **said):  # type: ignore
        assert not any(said[name].any() for name in ("dq", "dk", "dv"))
        return them.backward(dout, q, k, v, out, lse, **said)

    def named(cu_q, cu_k, max_q, max_k, dropout, causal, scale):  # type: ignore
        names = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p causal softmax_scale"
        values = (cu_q, cu_k, max_q, max_k, dropout, causal, scale)
        return dict(zip(names.split(), values, strict=True))

    def aten_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale):  # type: ignore
        return them.forward(q, k, v, **named(cu_q, cu_k, max_q, max_k, dropout, causal, scale))

    def aten_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        cu_q,
        cu_k,
        max_q,
        max_k,
        dropout,
        causal,
        seed,  # type: ignore
        unused,
        *,
        scale,
    ):
        said = named(cu_q, cu_k, max_q, max_k, dropout, causal, scale)
        return them.backward(dout, q, k, v, out, lse, **said)

    modules = {
        "flash_attn.flash_attn_interface": SimpleNamespace(
            _flash_attn_varlen_forward=them.forward, _flash_attn_varlen_backward=fa2_backward
        ),
        "flash_attn.cute.interface": SimpleNamespace(
            _flash_attn_fwd=them.forward, _flash_attn_bwd=fa4_backward
        ),
    }
    monkeypatch.setattr(packages, "_load", modules.__getitem__)
    known = {name: getattr(torch.ops.aten, name) for name in vars(torch_ops)["_KNOWN"]}
    fake = {"_flash_attention_forward": aten_forward, "_flash_attention_backward": aten_backward}
    monkeypatch.setattr(torch_ops, "_aten", SimpleNamespace(**(known | fake)))
    return them


@pytest.mark.parametrize("per_head", [False, True], ids=["shared", "heads"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("backend", CUDA)
def test_kernels_are_given_the_runs(
    kernels: Kernels, backend: str, causal: bool, per_head: bool
) -> None:
    """Fails if a kernel gets other bounds, too short a longest run, or its inf is left in lse."""
    bounds, _, _, num_keys = problem(causal, per_head)
    q, _, _, do = (x.float() for x in qkv(SEQLEN, batch=BATCH, num_heads=4, num_kv_heads=HEADS))
    _, k, v, _ = (x.float() for x in qkv(num_keys, batch=BATCH, num_kv_heads=HEADS, seed=1))
    block, cpu, mask, kv = BLOCKS[backend].packed, BLOCKS["cpu"].packed, Mask(causal), KV(k, v)
    assert block is not None and cpu is not None
    got, wanted = (b.forward(q, kv, mask, bounds, 0.4) for b in (block, cpu))
    inputs = BackwardInputs(do, q, kv, got[0], wanted[1].clamp(min=-5.0))
    both = (b.backward(inputs, mask, bounds, 0.4) for b in (block, cpu))
    for ours, theirs in zip((*got, *next(both)), (*wanted, *next(both)), strict=True):
        assert torch.equal(ours, theirs)
    assert len(kernels.said) == 2 and {said["causal"] for said in kernels.said} == {causal}


def test_no_run_is_taken_for_decoding(kernels: Kernels) -> None:
    """Fails if flash-attn 2 is told of runs of one query at most, which it takes for decoding."""
    q, k, v, _ = (x.float() for x in qkv(3, num_heads=4, num_kv_heads=2))
    bounds = Bounds(*[torch.tensor([0, 1, 1, 2, 3], dtype=torch.int32)] * 2, 1, 1, False)
    for name in ("flash", "flash_attn"):
        packed = BLOCKS[name].packed
        assert packed is not None
        packed.forward(q, KV(k, v), CAUSAL, bounds, 0.4)
        assert kernels.said[-1]["max_seqlen_q"] == 2


@pytest.mark.parametrize("backend", ["flash", "flash_attn"])
def test_a_kernel_of_another_form_is_named(kernels: Kernels, backend: str) -> None:
    """Fails if the lse of an older kernel, padded to the longest run, is read as rows."""
    kernels._cpu = (lambda q, *_: (q, q.new_zeros(3, 4, 5)), kernels._cpu[1])
    bounds, *_ = problem(False, False)
    q, k, v, _ = (x.float() for x in qkv(SEQLEN, batch=BATCH, num_kv_heads=HEADS))
    packed = BLOCKS[backend].packed
    assert packed is not None
    with pytest.raises(ImportError, match=r"returned lse .*\(3, 4, 5\).*expected float32"):
        packed.forward(q, KV(k, v).tokens(0, 8), FULL, bounds, 0.4)


def test_who_takes_documents() -> None:
    """Fails if cuDNN is handed documents, by name or by "auto"."""
    cuda = torch.device("cuda")
    with pytest.raises(ValueError, match=r"backend='cudnn': .*cu_seqlens.* that can: flash"):
        choose_backend("cudnn", torch.bfloat16, 64, cuda, packed=True)
    taken = choose_backend("auto", torch.bfloat16, 64, cuda, packed=True)
    assert taken.packed is not None and taken.name != "math"
    assert choose_backend("auto", torch.float64, 64, torch.device("cpu"), packed=True).name == "cpu"
    assert {b.name for b in BLOCKS.values() if b.packed is None} == {"cudnn"}
