"""check_ranks on gloo ranks: it passes what is right, and names what is not."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import lhcp
from bench.common.problem import PEER, AttentionProblem
from lhcp import reference
from lhcp.comm.layout import make_layout
from lhcp.comm.mesh import Ranks, as_ranks
from lhcp.lighthouse.select import Selection
from lhcp.ring.block import BLOCKS
from lhcp.ring.rotation import NAMES
from lhcp.testing.ranks import RankPool
from tests.evidence.check_problem import deal, distances
from tests.evidence.check_ranks import check, parse
from tests.evidence.check_rows import over_peer

CPU = torch.device("cpu")
SMALL = (
    *("--heads", "4", "--kv-heads", "2", "--head-dim", "8", "--dense-seqlen", "128"),
    *("--layer-seqlen", "512", "--layer-topk", "16", "--strata", "8", "--compiler", "none"),
    *("--long-dense-seqlens", "256", "--long-seqlens", "1024", "--long-topk", "16"),
    *("--long-levels", "3"),
)


def perturbed_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    block = BLOCKS["cpu"]

    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        out, lse = block.forward(*args)
        return out * 1.001, lse

    monkeypatch.setitem(BLOCKS, "cpu", replace(block, forward=forward))


def perturbed_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    block = BLOCKS["cpu"]

    def backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = block.backward(*args)
        return dq, dk * 1.001, dv

    monkeypatch.setitem(BLOCKS, "cpu", replace(block, backward=backward))


def other_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    original = lhcp.select

    def select(q: Tensor, k: Tensor, **choices: Any) -> Selection:
        entries, places = original(q, k, **choices)
        return Selection(entries.roll(1, -1), places)

    monkeypatch.setattr(lhcp, "select", select)


def wrong_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    original = reference.causal_attention
    monkeypatch.setattr(reference, "causal_attention", lambda *args: 2 * original(*args))


def failing_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        raise RuntimeError("this kernel cannot")

    monkeypatch.setitem(BLOCKS, "cpu", replace(BLOCKS["cpu"], forward=forward))


def run(
    group: Any, at: int, sabotage: Callable[[pytest.MonkeyPatch], None] | None, *more: str
) -> dict[str, Any]:
    """Check the ranks, with something wrong on rank `at`."""
    ranks = as_ranks(group)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if sabotage is not None and ranks.rank == at:
            sabotage(monkeypatch)
        return check(parse([*SMALL, *more]), ranks, CPU)


@pytest.mark.parametrize("documents", [0, 5])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_right_answers_pass(ranks: RankPool, dtype: str, documents: int) -> None:
    """Fails if a right rotation is called wrong, or a rotation or a check is left out."""
    asked = ("--dtype", dtype, "--documents", str(documents))
    first, second = ranks.run(run, 2, 0, None, *asked, num_nodes=2)
    packed = f", {documents} documents" if documents else ""
    assert first["wrong"] == []
    assert [row["wrong"] for row in first["rows"]] == [row["wrong"] for row in second["rows"]]
    names = {"auto", *NAMES}
    for check_name, kind, seqlen in (
        ("float64", "dense", 128),
        ("float64", "layer", 512),
        ("one rank", "dense", 256),
        ("one rank", "layer", 1024),
    ):
        found = [
            row
            for row in first["rows"]
            if (row["check"], row["kind"], row["seqlen"]) == (check_name, kind + packed, seqlen)
        ]
        assert {row["rotation"] for row in found} - {"one rank"} == names
        assert all(set(row["error"]) == {"out", "dq", "dk", "dv"} for row in found)


@pytest.mark.parametrize(
    ("sabotage", "tensor"), [(perturbed_kernel, "out"), (perturbed_gradient, "dk")]
)
def test_one_wrong_rank_is_caught(
    ranks: RankPool, sabotage: Callable[..., None], tensor: str
) -> None:
    """Fails if an error of a thousandth on one rank passes in any row."""
    for document in ranks.run(run, 2, 1, sabotage, num_nodes=2):
        attended = [row for row in document["rows"] if row["rotation"] != "one rank"]
        # "auto" and every rotation, dense and layer, two lengths each.
        assert len(attended) == len(document["wrong"]) == 4 * (1 + len(NAMES))
        assert all(row["wrong"] for row in attended)
        assert all(row["error"][tensor] > 1e-4 for row in attended)


def test_other_entries_are_caught(ranks: RankPool) -> None:
    """Fails if a rank may select other entries than one rank does."""
    document, _ = ranks.run(run, 2, 1, other_entries, num_nodes=2)
    for row in document["rows"]:
        expected = row["kind"] == "layer" and row["rotation"] != "one rank"
        assert ("rank 1: selects other entries" in (row["wrong"] or "")) == expected


def test_wrong_truth_is_caught(ranks: RankPool) -> None:
    """Fails if a reference that one rank is far from makes every budget pass in silence."""
    document, _ = ranks.run(run, 2, 0, wrong_reference, num_nodes=2)
    for kind in ("dense", "layer"):
        assert any(text.split()[1] == kind and "one rank" in text for text in document["wrong"])


def test_rank_0_alone_fails_on_every_rank(ranks: RankPool) -> None:
    """Fails if the others wait for ever for what rank 0 could not compute."""
    with pytest.raises(AssertionError, match="this kernel cannot") as caught:
        ranks.run(run, 2, 0, failing_kernel, num_nodes=2)
    assert str(caught.value).count("rank 0 alone, dense of 128 tokens") >= 2


def dealt(group: Any) -> tuple[bool, float]:
    """Deal a strided whole; whether this rank has its part, and the distance to twice of it."""
    ranks = Ranks(group)
    problem = AttentionProblem(
        seqlen=64, num_heads=2, num_kv_heads=2, head_dim=4, dtype=torch.float32
    )
    layout = make_layout("zigzag", ranks.world_size)
    whole = problem.inputs(range(layout.num_chunks), layout.num_chunks, CPU)[0]
    own = problem.inputs(layout.chunks(ranks.rank), layout.num_chunks, CPU)[0]
    strided = whole.transpose(1, 2).contiguous().transpose(1, 2)
    got = deal(strided if ranks.rank == 0 else None, own, torch.float32, ranks)
    far = distances((2 * got,) * 4, (own,) * 4, ranks)
    return torch.equal(got, own), far["out"]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_rank_gets_its_own_part(ranks: RankPool, world: int) -> None:
    """Fails if parts go to the wrong rank or place, or a distance is not relative."""
    for same, far in ranks.run(dealt, world):
        assert same and far == pytest.approx(1.0)


def test_errors_over_the_peer() -> None:
    """Fails if a ratio over the goal passes, or a row is held against another kind's."""

    def row(rotation: str, kind: str, error: float) -> dict[str, Any]:
        errors = {"out": error, "dq": 1.0, "dk": 1.0, "dv": 1.0}
        named = {"rotation": rotation, "took": rotation, "backend": "flash_attn"}
        return {"kind": kind, "seqlen": 8, **named, "error": errors, "wrong": None}

    rows = [row("one rank", "dense", 9.0), row("p2p", "dense", 1.04), row("auto", "dense", 1.06)]
    rows += [row("p2p", "layer", 9.0), row(PEER, "dense", 1.0)]
    first, second = over_peer(rows, 1.05)
    assert (first["rotation"], first["wrong"], first["ratio"]["out"]) == ("p2p", None, 1.04)
    assert second["wrong"] and "out" in second["wrong"]
