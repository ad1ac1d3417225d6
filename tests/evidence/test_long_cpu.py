"""The long layer: its formula is the reference, and a wrong rank ends it with status 1."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.common.problem import AttentionProblem
from lhcp import reference
from lhcp.config import LighthouseConfig
from lhcp.testing.inputs import qkv, small_config
from lhcp.testing.ranks import RankPool
from lhcp.testing.tolerance import assert_close_float64
from tests.evidence import long_cpu
from tests.evidence.long_formula import at_positions
from tests.evidence.programs import end_of, on_rank_one

right_long = long_cpu.answer

LONG = "--seqlen 2048 --ranks 4 --nodes 2 --levels 3 --topk 32 --strata 16 --dtypes {}"

SHAPES = [
    # levels, pool factor, strata, picks, heads, kv heads
    (2, 2, 1, 2, 1, 1),
    (3, 2, 8, 2, 4, 2),
    (3, 4, 4, 2, 3, 1),
    (4, 4, 2, 4, 2, 2),
    (4, 2, 8, 4, 4, 2),
    (2, 8, 2, 2, 1, 1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula_is_the_reference(shape: tuple[int, ...]) -> None:
    """Fails if one term of one position is missing: all positions, blocks that do not divide S."""
    levels, factor, strata, picks, heads, kv_heads = shape
    config, seqlen = small_config(levels, factor, strata, picks)
    inputs = qkv(seqlen, num_heads=heads, num_kv_heads=kv_heads, head_dim=4, seed=sum(shape))
    q, k, v, dout = inputs
    selection = reference.select(*reference.token_scores(q, k, v, config), config)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = reference.lighthouse_attention(*leaves, config=config, selection=selection)
    wanted = (out.detach(), *torch.autograd.grad(out, leaves, dout))
    found, lse = at_positions(inputs, config, selection, torch.arange(seqlen), block=7)
    for name, got, want in zip(found._fields, found, wanted, strict=True):
        assert_close_float64(name, got, want[0], budget=1e-13)
    assert lse > 0


def test_formula_refuses_a_batch() -> None:
    """Fails if all but the first sequence of a batch were left out in silence."""
    config, seqlen = small_config()
    inputs = qkv(seqlen, batch=2)
    selection = reference.select(*reference.token_scores(*inputs[:3], config), config)
    with pytest.raises(ValueError, match="a batch of 2"):
        at_positions(inputs, config, selection, torch.arange(4))


def test_samples_reach_what_can_go_wrong() -> None:
    """Fails if no sample gets rows of another rank, or none is an entry itself."""
    config = LighthouseConfig(num_levels=3, pool_factor=2, topk=16, num_strata=8)
    problem = AttentionProblem(
        seqlen=256, num_heads=1, num_kv_heads=1, head_dim=4, dtype=torch.float64, config=config
    )
    selection = long_cpu.select(problem, problem.inputs(range(8), 8, torch.device("cpu")))
    positions = long_cpu.sample(selection, problem, 24).tolist()
    assert len(set(positions)) == 24 and {0, 1, 255} <= set(positions)
    starts = set(range(32, 256, 32))
    assert len(starts & set(positions)) >= 4
    tokens = set(selection.indices[selection.levels == 0].tolist())
    assert len(tokens & set(positions)) >= 6


def wrong_long(group: Any, *args: Any) -> Any:
    """Make dk of rank 1 a hundredth too large."""
    found = right_long(group, *args)
    if on_rank_one(group):
        found["rows"][2] *= 1.01
    return found


def other_entries_long(group: Any, *args: Any) -> Any:
    """Return rank 1's entries in another order."""
    found = right_long(group, *args)
    if on_rank_one(group):
        found["entries"] = (found["entries"][0], found["entries"][1].roll(1))
    return found


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_long_that_holds(ranks: RankPool, tmp_path: Path, dtype: str) -> None:
    """Fails if the ranks differ from the formula, or a rotation is missing."""
    code, document = end_of(long_cpu, ranks, LONG.format(dtype), tmp_path / "page")
    assert code is None and document["wrong"] == []
    rows = [(r["rotation"], r["tensor"]) for r in document["records"] if "tensor" in r]
    assert len(rows) == 8 and ("p2p", "dk") in rows and ("hierarchical", "out") in rows


@pytest.mark.parametrize(
    ("answer", "dtype", "said"),
    [
        (wrong_long, "float32", "p2p, dk: error"),
        (wrong_long, "float64", "hierarchical, dk: error"),
        (other_entries_long, "float32", "p2p: selection equal False"),
    ],
    ids=["gradient", "gradient64", "entries"],
)
def test_long_that_does_not_hold(
    ranks: RankPool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: Any,
    dtype: str,
    said: str,
) -> None:
    """Fails if a wrong gradient or a wrong selection on one rank ends with status 0."""
    monkeypatch.setattr(long_cpu, "answer", answer)
    code, document = end_of(long_cpu, ranks, LONG.format(dtype), tmp_path / "page")
    assert isinstance(code, str) and said in code and said in "; ".join(document["wrong"])
