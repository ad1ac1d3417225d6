"""What DESIGN.md says of adding a block, a rotation and a scorer: done here, file by file."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import lhcp
from lhcp import LighthouseConfig, config
from lhcp.layer.plan import choose_backend
from lhcp.lighthouse.kernel_set import QKV
from lhcp.lighthouse.norms import level_scores, token_scores
from lhcp.lighthouse.score import SCORERS, ScoreInputs, Scorer
from lhcp.ring.block import BLOCKS
from lhcp.ring.kv import KV
from lhcp.ring.rotation import ROTATIONS
from lhcp.ring.rotation.p2p import P2P
from lhcp.ring.shape import Mask
from lhcp.testing.inputs import qkv, small_config
from lhcp.testing.ranks import RankPool


@pytest.fixture
def block() -> Iterator[list[int]]:
    """A new backend: one record in the table. Counts its calls."""
    calls: list[int] = []

    def forward(q: Tensor, kv: KV, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
        calls.append(q.shape[1])
        return BLOCKS["math"].forward(q, kv, mask, scale)

    BLOCKS["mine"] = replace(BLOCKS["math"], name="mine", forward=forward, preference=1)
    yield calls
    del BLOCKS["mine"]


def test_a_block_is_one_row(block: list[int]) -> None:
    """Fails if a new backend is not found by name, or its preference is not what decides."""
    q, k, v, _ = qkv(16)
    out = lhcp.ring_attention(q, k, v, backend="mine")
    assert torch.equal(out, lhcp.ring_attention(q, k, v, backend="math")) and block == [16]
    assert choose_backend("auto", torch.float64, 16, torch.device("cpu")).name == "mine"
    with pytest.raises(ValueError, match=r"must be one of auto, .*mine"):
        lhcp.ring_attention(q, k, v, backend="yours")


class Backwards(P2P):
    """A new rotation: a class for the one loop."""

    made = 0

    def __init__(self, *made_from: Any) -> None:
        super().__init__(*made_from)
        type(self).made += 1


def by_a_new_rotation(group: Any) -> tuple[bool, int]:
    ROTATIONS["backwards"] = Backwards
    try:
        q, k, v, do = (lhcp.shard(x, group) for x in qkv(48))
        results = []
        for rotation in ("backwards", "p2p"):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            out = lhcp.ring_attention(*leaves, group=group, rotation=rotation)
            results.append((out, *torch.autograd.grad(out, leaves, do)))
        return all(torch.equal(*pair) for pair in zip(*results, strict=True)), Backwards.made
    finally:
        del ROTATIONS["backwards"]


def test_a_rotation_is_one_row(ranks: RankPool) -> None:
    """Fails if the loop, the plan or an operator knows the rotations by another list."""
    assert ranks.run(by_a_new_rotation, 3) == [(True, 2)] * 3


def _loud_values(tokens: QKV, inputs: ScoreInputs) -> tuple[Tensor, Tensor]:
    levels = level_scores(token_scores(tokens.v, tokens.k.shape[2]), inputs.geom)
    return levels, levels


@pytest.fixture
def scorer(monkeypatch: pytest.MonkeyPatch) -> LighthouseConfig:
    """A new scorer: its name for configs, a record in the table."""
    monkeypatch.setattr(config, "SCORER_NAMES", (*config.SCORER_NAMES, "values"))
    monkeypatch.setitem(SCORERS, "values", Scorer(_loud_values, True, False))
    return replace(small_config()[0], scorer="values")  # type: ignore[arg-type]


def test_a_scorer_is_one_row(scorer: LighthouseConfig) -> None:
    """Fails if a scorer that is not one of today's is taken for another."""
    q, k, v, _ = qkv(small_config()[1])
    chosen = lhcp.select(q, k, config=scorer, v=v)
    by_norm = lhcp.select(v, v, config=replace(scorer, scorer="norm"))
    assert torch.equal(chosen.entries, by_norm.entries)
    out = lhcp.lighthouse_attention(q, k, v, config=scorer)
    again = lhcp.lighthouse_attention(q, k, v, config=scorer, selection=chosen)
    assert torch.equal(out, again)
    with pytest.raises(ValueError, match="pass v="):
        lhcp.select(q, k, config=scorer)
