"""Packed documents beside the same call without: what is drawn, compared and called."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lhcp
from bench.common.problem import AttentionProblem, Choice
from bench.common.turns import Spread
from bench.rotation.document_arms import VARLEN, Documents
from bench.rotation.document_setting import MULTIPLE, draw_bounds
from bench.rotation.documents import GATE_TOKENS, config_for, gate, ratios
from lhcp.comm.mesh import Ranks
from tests.bench.commands import SMALL, TORCHRUN, last_json

CPU = torch.device("cpu")


def test_lengths_are_multiples_and_seeded() -> None:
    first, again, other = (draw_bounds(8192, 512, 1.0, seed) for seed in (1, 1, 2))
    assert first.tolist() == again.tolist() != other.tolist()
    assert first[0] == 0 and (first % MULTIPLE == 0).all() and (first.diff() > 0).all()


@pytest.mark.parametrize("seqlen", [GATE_TOKENS, 131_072, 1_048_576])
def test_documents_of_2048_tokens_fit_the_layer(seqlen: int) -> None:
    """Fails if a layer of the benchmark refuses its documents, which then takes a GPU to see."""
    starts = draw_bounds(seqlen, 2048, 1.0, 4)
    bounds = torch.cat([starts, torch.tensor([seqlen])]).int()
    config = config_for(seqlen)
    lhcp.packing.read_packing(bounds, 1, seqlen).check_fits(config, 4)


def test_ratios_compare_like_with_like() -> None:
    """Fails if a graph is held against a call, or varlen on one GPU is not shared by the ranks."""
    ms = {"plain": 8.0, "packed 4": 4.0, "varlen 4": 6.0, "plain graph": 2.0, "packed 4 graph": 3.0}
    of = ratios({name: Spread.of([x]) for name, x in ms.items()}, 2)
    assert of["packed 4 over plain"] == 0.5
    assert of["packed 4 graph over plain"] == 1.5
    assert of["packed 4 over varlen / W"] == pytest.approx(4 * 2 / 6)


def test_the_gate_refuses_a_wrong_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = AttentionProblem(
        seqlen=256, num_heads=2, num_kv_heads=1, head_dim=16, dtype=torch.float32
    )
    choice = Choice("auto", "cpu", Ranks())
    gate(problem, choice, CPU)
    whole = lhcp.ring_attention

    def wrong(*qkv: Tensor, **more: Any) -> Tensor:
        out = whole(*qkv, **more)
        assert isinstance(out, Tensor)
        return out if more["backend"] == "math" else out * 1.01

    monkeypatch.setattr(lhcp, "ring_attention", wrong)
    with pytest.raises(AssertionError, match="out: error"):
        gate(problem, choice, CPU)


def test_varlen_is_told_where_documents_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if flash-attn 2's function is given other bounds, or is not causal."""
    package = tmp_path / "flash_attn"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "flash_attn_interface.py").write_text(
        "def flash_attn_varlen_func(q, k, v, cu_q, cu_k, most_q, most_k, causal=False):\n"
        "    assert causal and cu_q is cu_k and most_q == most_k == int(cu_q.diff().max())\n"
        "    import lhcp\n"
        "    return lhcp.ring_attention(q[None], k[None], v[None], cu_seqlens=cu_q)[0]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [n for n in sys.modules if n.split(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    starts = draw_bounds(256, 64, 1.0, 4)
    docs = Documents.of(starts, 256, CPU)
    q, k, v = (torch.randn(1, 256, 2, 16) for _ in range(3))
    got: Tensor = VARLEN["flash_attn"](docs)(q, k, v)
    assert torch.equal(got, lhcp.ring_attention(q, k, v, cu_seqlens=docs.cu_seqlens))
    for name in [n for n in sys.modules if n.split(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.slow
def test_two_ranks_measure() -> None:
    sizes = ("--seqlens", "4096", "--means", "256", "--device", "cpu")
    command = (*TORCHRUN, "2", "-m", "bench.rotation.documents", *sizes, *SMALL)
    document = last_json(*command)
    assert [row["mode"] for row in document["rows"]] == ["lighthouse", "dense"]
    for row in document["rows"]:
        assert set(row["ms"]) == {"plain", "packed 1024", "packed 128", "packed 256"}
        # What is gathered is gathered whole, whatever the documents.
        assert row["rotation"]["packed"] == "p2p"
        assert set(row["ratios"]) == {f"packed {n} over plain" for n in (1024, 128, 256)}
