"""`diagnose`: against a brute-force oracle in float64, over ranks, and what it warns of."""

import json
from dataclasses import asdict
from itertools import combinations
from statistics import fmean, pstdev
from typing import Any

import pytest
import torch
from torch import Tensor

import lhcp
from lhcp import LighthouseConfig, reference
from lhcp.comm.layout import LayoutName
from lhcp.measure import LevelReport, SelectionReport
from lhcp.reference_documents import documents, first_tokens
from lhcp.testing.inputs import qkv, small_config
from lhcp.testing.ranks import RankPool
from tests.documents import cu_seqlens

CONFIG, SEQLEN = small_config(picks=8)


def inputs(scorer: str = "norm") -> tuple[LighthouseConfig, Tensor, Tensor, Tensor]:
    """Two sequences, three kv heads of two query heads; some scores are there twice."""
    config, seqlen = small_config(picks=8, scorer=scorer)  # type: ignore[arg-type]
    q, k, v, _ = qkv(seqlen, batch=2, num_heads=6, num_kv_heads=3, head_dim=8)
    # Values repeat at a distance, so that some picks are near-ties.
    for x in (q, k):
        x[:, seqlen // 2 : seqlen // 2 + seqlen // 16] = x[
            :, seqlen // 2 + seqlen // 16 : seqlen // 2 + seqlen // 8
        ]
    return config, q, k, v


def near_to(score: float, left: list[float]) -> bool:
    """Tell whether a pick is within a thousandth of the best that is left."""
    return bool(left) and score <= max(left) * 1.001


def oracle(
    sq: Tensor, sk: Tensor, config: LighthouseConfig, cu_seqlens: Tensor | None = None
) -> list[dict[str, Any]]:
    """Return all numbers of the levels, the coarsest first, by loops over one entry at a time."""
    if cu_seqlens is None:
        cu_seqlens = torch.arange(sq.shape[0] + 1) * sq.shape[2]
    docs = documents(cu_seqlens, sq.shape[0], sq.shape[2])
    p, strata, half = config.pool_factor, config.num_strata, config.picks // 2
    batch, heads, seqlen = sq.shape
    levels = range(config.num_levels - 1, 0, -1)
    picked: dict[tuple[int, int, int, int], set[int]] = {}
    near = {level: [] for level in levels}
    for b in range(batch):
        for h in range(heads):
            for s in range(strata):
                top = seqlen // p ** (config.num_levels - 1) // strata
                candidates = list(range(s * top, (s + 1) * top))
                for level in levels:
                    row = docs[b : b + 1]
                    q, k = (reference.level_scores(x[b, h], row, p**level) for x in (sq, sk))
                    first = {t // p**level for t in first_tokens(docs, b)}
                    forced = first & set(candidates)
                    by_rule = set(sorted(forced)[:half])
                    taken = set(reference.take(candidates, q, k, config.picks, sorted(forced)))
                    rest = sorted(set(candidates) - forced, key=lambda i: (-q[i], i))
                    by_query = set(rest[: half - len(by_rule)])
                    query_left = [q[i] for i in candidates if i not in by_query | by_rule]
                    key_left = [k[i] for i in candidates if i not in taken]
                    near[level] += [near_to(q[i], query_left) for i in sorted(by_query)]
                    by_key = taken - by_query - forced
                    near[level] += [near_to(k[i], key_left) for i in sorted(by_key)]
                    picked[level, b, h, s] = taken
                    candidates = [i * p + child for i in sorted(taken) for child in range(p)]
    everything = sum(len(x) for x in picked.values())

    def spread(score: Tensor, level: int) -> list[float]:
        found = []
        for h in range(heads):
            rows = zip(score[:, h], docs.split(1), strict=True)
            values = [x for row, of in rows for x in reference.level_scores(row, of, p**level)]
            found.append(pstdev(values) / fmean(values))
        return found

    def parents(level: int, keep: Any) -> float:
        flags = [
            any(i * p + child in picked[level - 1, *at] for child in range(p))
            for (at_level, *at), taken in picked.items()
            if at_level == level and keep(*at)
            for i in taken
        ]
        return fmean(flags)

    found = []
    for level in levels:
        whole = {
            (b, h): set().union(*(picked[level, b, h, s] for s in range(strata)))
            for b in range(batch)
            for h in range(heads)
        }
        pairs = [
            (whole[b, i], whole[b, j])
            for b in range(batch)
            for i, j in combinations(range(heads), 2)
        ]
        by_stratum = [
            sum(len(picked[level, b, h, s]) for b in range(batch) for h in range(heads))
            / everything
            for s in range(strata)
        ]
        fine = level == 1
        found.append(
            {
                "level": level,
                "spread_q": spread(sq, level),
                "spread_k": spread(sk, level),
                "picks": by_stratum,
                "parents": None if fine else parents(level, lambda b, h, s: True),
                "parents_by_head": []
                if fine
                else [parents(level, lambda b, h, s, i=i: h == i) for i in range(heads)],
                "parents_by_stratum": []
                if fine
                else [parents(level, lambda b, h, s, i=i: s == i) for i in range(strata)],
                "overlap": fmean(len(a & b) / len(a | b) for a, b in pairs) if pairs else None,
                "near_ties": fmean(near[level]),
            }
        )
    return found


def numbers(levels: Any) -> list[float]:
    """Return all numbers of levels, one after another; -1 for none."""
    rows = [asdict(x) if isinstance(x, LevelReport) else x for x in levels]
    return [
        -1.0 if value is None else value
        for row in rows
        for inside in row.values()
        for value in (inside if isinstance(inside, list | tuple) else [inside])
    ]


@pytest.mark.parametrize("scorer", ["norm", "dilated"])
def test_equals_the_oracle(scorer: str) -> None:
    """Fails if a number is not what loops over the reference's picks count."""
    config, q, k, v = inputs(scorer)
    expected = oracle(*reference.token_scores(q, k, v, config), config)
    report = lhcp.diagnose(q, k, config, v=v)
    assert numbers(report.levels) == pytest.approx(numbers(expected), rel=1e-7, abs=1e-12)
    # Else the numbers could be right for nothing.
    assert scorer == "dilated" or all(0 < level.near_ties < 1 for level in report.levels)
    assert (report.seqlen, report.world_size) == (q.shape[1], 1)


@pytest.mark.parametrize("kind", ["all that fit", "around windows", "random 0"])
@pytest.mark.parametrize("scorer", ["norm", "dilated"])
def test_of_documents_equals_the_oracle(scorer: str, kind: str) -> None:
    """Fails if what is forced counts as picked by its score, or a mixed window has all of its."""
    config, q, k, v = inputs(scorer)
    given = cu_seqlens(kind, config, q.shape[1], q.shape[0])
    docs = documents(given, q.shape[0], q.shape[1])
    scores = reference.token_scores(q, k, v, config, docs=docs)
    report = lhcp.diagnose(q, k, config, v=v, cu_seqlens=given)
    expected = oracle(*scores, config, given)
    assert numbers(report.levels) == pytest.approx(numbers(expected), rel=1e-7, abs=1e-12)


@pytest.mark.parametrize(
    "more", [{"num_levels": 2, "pool_factor": 4}, {"num_levels": 4}, {"picks": 2, "num_strata": 1}]
)
def test_other_sizes_equal_the_oracle(more: dict[str, int]) -> None:
    """Fails if a level, a pool factor or the first stratum is counted in another way."""
    config, seqlen = small_config(**more)
    q, k, v, _ = qkv(seqlen, num_heads=2, head_dim=5, seed=3)
    expected = oracle(*reference.token_scores(q, k, v, config), config)
    got = lhcp.diagnose(q, k, config)
    assert numbers(got.levels) == pytest.approx(numbers(expected), rel=1e-7, abs=1e-12)


def on_ranks(group: Any, layout: LayoutName) -> SelectionReport:
    config, q, k, _ = inputs()
    own = (lhcp.shard(x, group, layout=layout) for x in (q, k))
    return lhcp.diagnose(*own, config, group=group, layout=layout)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_same_on_any_number_of_ranks(ranks: RankPool, world_size: int, layout: LayoutName) -> None:
    """Fails if a rank misses, or counts twice, what another has, or strata change places."""
    alone = on_ranks(None, layout)
    for report in ranks.run(on_ranks, world_size, layout):
        assert numbers(report.levels) == pytest.approx(numbers(alone.levels), rel=1e-7)
        assert report.warnings == alone.warnings
        assert (report.seqlen, report.world_size) == (alone.seqlen, world_size)


def refused(group: Any) -> str:
    config, q, k, _ = inputs()
    own = [lhcp.shard(x, group) for x in (q, k)]
    try:
        lhcp.diagnose(*own, config, group=group, score_k=own[1] if group.rank() else None)
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_that_ask_for_other_things_are_named(ranks: RankPool) -> None:
    """Fails if ranks that score different tensors add up their counts in silence."""
    assert all("scores given" in said for said in ranks.run(refused, 2))


def test_random_scores_do_not_warn() -> None:
    """Fails if a selection that is alive is called dead."""
    q, k, _, _ = qkv(SEQLEN, num_kv_heads=2)
    report = lhcp.diagnose(q, k, CONFIG)
    assert report.warnings == () and "nothing looks wrong" in str(report)
    assert 0.1 < report.spread_q < 1 and 0.1 < report.spread_k < 1 and report.near_ties < 0.05


@pytest.mark.parametrize("side", ["q", "k"])
def test_normalised_tensors_warn_until_their_scores_are_given(side: str) -> None:
    """Fails if near-constant scores of one side, as of a QK-norm, go unnoticed."""
    q, k, _, _ = qkv(SEQLEN, num_kv_heads=2, dtype=torch.float32)
    before = {"q": q, "k": k}
    after = before | {side: torch.nn.functional.normalize(before[side], dim=-1).bfloat16().float()}
    report = lhcp.diagnose(after["q"], after["k"], CONFIG)
    (said,) = [w for w in report.warnings if "nearly constant" in w]
    assert said.startswith(f"scores of {side} ") and f"as score_{side}" in said
    given = {f"score_{side}": before[side]}
    assert lhcp.diagnose(after["q"], after["k"], CONFIG, **given).warnings == ()


def test_equal_scores_warn_of_all_that_follows() -> None:
    """Fails if the first entries of each stratum, taken by index, look like a selection."""
    q, k = torch.ones(1, SEQLEN, 2, 4), torch.ones(1, SEQLEN, 2, 4)
    report = lhcp.diagnose(q, k, CONFIG)
    said = "\n".join(report.warnings)
    for part in (
        "scores of q are nearly constant",
        "scores of k are nearly constant",
        "head 0, 1: all picks of level 1 lie in 1 of 2 picks of level 2",
        "stratum 0, 1, 2",
        "all kv heads pick the same",
        "more than half of the picks at levels 2, 1",
    ):
        assert part in said, said
    assert report.near_ties == 1 and report.overlap == 1


def test_scores_that_are_not_finite_are_counted() -> None:
    """Fails if NaN spoils the spread, or is not told of."""
    q, k, _, _ = qkv(SEQLEN, num_kv_heads=2)
    q[0, 5, 0, 0] = torch.nan
    report = lhcp.diagnose(q, k, CONFIG)
    # One entry of each of two levels.
    assert report.warnings[0].startswith("2 scores of q are not finite")
    assert all(0 < x < 2 for level in report.levels for x in level.spread_q)


def test_a_single_head_has_no_overlap() -> None:
    q, k, _, _ = qkv(SEQLEN, num_heads=1)
    report = lhcp.diagnose(q, k, CONFIG)
    assert report.overlap is None and report.warnings == ()


def test_the_table_and_the_json_say_all() -> None:
    """Fails if a level or a column is lost on the way to a reader."""
    config, q, k, _ = inputs()
    report = lhcp.diagnose(q, k, config)
    lines = report.table().splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["2", "1"]
    assert lines[-1].endswith("6.25% each") and f"N={q.shape[1]:,}" in lines[0]
    again = json.loads(json.dumps(report.to_json()))
    assert [level["level"] for level in again["levels"]] == [2, 1]
    assert again["levels"][0]["near_ties"] == report.levels[0].near_ties


def test_gradients_and_inputs_stay_as_they_are() -> None:
    """Fails if looking at q and k changes them, or enters the graph."""
    q, k, _, _ = qkv(SEQLEN)
    copies = q.clone(), k.clone()
    q.requires_grad_()
    lhcp.diagnose(q, k, CONFIG)
    assert q.grad_fn is None and torch.equal(q, copies[0]) and torch.equal(k, copies[1])


def test_a_dilated_scorer_wants_values() -> None:
    config, q, k, _ = inputs("dilated")
    with pytest.raises(ValueError, match="pass v="):
        lhcp.diagnose(q, k, config)
