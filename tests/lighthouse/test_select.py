"""The selection on one rank: against the reference, and the properties that define it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lhcp import LighthouseConfig, reference
from lhcp.lighthouse.geometry import Geometry
from lhcp.lighthouse.score import level_scores
from lhcp.lighthouse.select import Selection, select

INF = float("inf")


def geometry(config: LighthouseConfig, seqlen: int) -> Geometry:
    return Geometry.local(config, seqlen, world_size=1, num_chunks=1, rank=0)


def make(
    num_levels: int = 3, pool_factor: int = 2, num_strata: int = 2, picks: int = 2, spare: int = 3
) -> tuple[LighthouseConfig, Geometry]:
    """A config, and the geometry in which a stratum has `picks + spare` coarsest entries."""
    config = LighthouseConfig(
        num_levels=num_levels,
        pool_factor=pool_factor,
        num_strata=num_strata,
        topk=picks * num_strata,
    )
    return config, geometry(config, config.seqlen_multiple * (picks + spare))


def taken_by(selection: Selection, geom: Geometry) -> Tensor:
    """Which entries of the pyramid are expanded: their first child is in. [B, Hk, pyramid_size]"""
    present = selection.row_of_entry >= 0
    taken = torch.zeros_like(present)
    for level in range(1, geom.num_levels):
        first_child = geom.offset(level - 1) + geom.pool_factor * torch.arange(
            geom.level_size(level)
        )
        # A coarsest entry is always in; any other only as somebody's child.
        taken[..., geom.offset(level) : geom.offset(level + 1)] = present[..., first_child]
    return taken


sizes = st.fixed_dictionaries(
    {
        "num_levels": st.integers(2, 4),
        "pool_factor": st.integers(2, 4),
        "num_strata": st.integers(1, 3),
        "picks": st.sampled_from((2, 4, 6)),
        "spare": st.integers(0, 5),
    }
)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(sizes=sizes, seed=st.integers(0, 2**31), distinct=st.sampled_from((1, 2, 3, 10, 10**6)))
def test_equals_the_reference(sizes: dict[str, int], seed: int, distinct: int) -> None:
    """Fails if a tie, an infinite score, a stratum or the order is treated in another way."""
    config, geom = make(**sizes)
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 2, geom.num_tokens)
    sq, sk = (torch.randint(distinct, shape, generator=generator).double() for _ in range(2))
    for score in (sq, sk):
        score[torch.rand(shape, generator=generator) < 0.1] = INF
    expected = reference.select(sq, sk, config)
    got = select(level_scores(sq, geom), level_scores(sk, geom), geom)
    assert torch.equal(got.levels(geom), expected.levels)
    assert torch.equal(got.indices(geom), expected.indices)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(sizes=sizes, seed=st.integers(0, 2**31))
def test_structure(sizes: dict[str, int], seed: int) -> None:
    """Fails if an entry is missing, is there twice or is out of order, or a count is wrong."""
    config, geom = make(**sizes)
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 2, geom.pooled_size)
    sq, sk = (torch.rand(shape, generator=generator) for _ in range(2))
    got = select(sq, sk, geom)
    assert got.entries.dtype == got.row_of_entry.dtype == torch.int32
    assert got.subsequence == config.subsequence_length(geom.num_tokens) == geom.subsequence

    # The two maps are inverses: each entry is in at most once.
    in_order = torch.arange(geom.subsequence).expand(1, 2, -1)
    assert torch.equal(got.row_of_entry.gather(2, got.entries.long()).long(), in_order)
    assert bool(((got.row_of_entry >= 0).sum(2) == geom.subsequence).all())

    # Post-order: the last token covered, then the level, strictly ascending.
    levels, indices = got.levels(geom), got.indices(geom)
    window = torch.tensor([geom.window(level) for level in range(geom.num_levels)])[levels]
    keys = ((indices + 1) * window - 1) * geom.num_levels + levels
    assert bool((keys.diff(dim=2) > 0).all())

    # Every stratum expands m entries of each level, and all children of the expanded are in.
    taken, present = taken_by(got, geom), got.row_of_entry >= 0
    for level in range(geom.num_levels - 1, 0, -1):
        entries = slice(geom.offset(level), geom.offset(level + 1))
        below = slice(geom.offset(level - 1), geom.offset(level))
        per_stratum = taken[..., entries].unflatten(2, (geom.num_strata, -1)).sum(3)
        assert bool((per_stratum == geom.picks).all())
        children = taken[..., entries].repeat_interleave(geom.pool_factor, 2)
        assert torch.equal(children, present[..., below])
        # Entry 0 of the whole sequence is forced at each level.
        assert bool(taken[..., geom.offset(level)].all())


@pytest.mark.parametrize("has_first", [True, False], ids=["first", "later"])
def test_equal_scores_go_to_the_lower_index(has_first: bool) -> None:
    """Fails if ties follow a sort's whim: the first m of each stratum must be taken."""
    _, geom = make(num_levels=3, pool_factor=3, num_strata=2, picks=4)
    geom = Geometry(**{**vars(geom), "has_first": has_first})
    equal = torch.ones(1, 1, geom.pooled_size)
    got = select(equal, equal, geom)
    coarse = taken_by(got, geom)[0, 0, geom.offset(2) :].unflatten(0, (2, -1))
    assert coarse.tolist() == [[True] * 4 + [False] * 3] * 2
    # At level 1 the candidates are the children of those: again the first four of each stratum.
    middle = taken_by(got, geom)[0, 0, geom.offset(1) : geom.offset(2)].unflatten(0, (2, -1))
    assert middle.nonzero()[:, 1].tolist() == [0, 1, 2, 3] * 2


def test_a_tie_at_the_cut_goes_to_the_lower_index() -> None:
    """Fails if ties are broken by the place in a list of candidates already reordered."""
    _, geom = make(num_levels=2, pool_factor=2, num_strata=1, picks=4, spare=4)
    geom = Geometry(**{**vars(geom), "has_first": False})
    sq = torch.tensor([[[0.0, 7, 5, 5, 9, 5, 0, 0]]])
    sk = torch.tensor([[[1.0, 3, 3, 9, 9, 2, 3, 3]]])
    got = select(sq, sk, geom)
    # By sq: 4 (9), 1 (7). By sk of the rest: 3 (9), then 2, 6 and 7 tie at 3: 2.
    assert taken_by(got, geom)[0, 0, geom.offset(1) :].nonzero()[:, 0].tolist() == [1, 2, 3, 4]


def test_the_forced_entry_uses_a_place_of_the_query_half() -> None:
    """Fails if entry 0 is added to the picks, or takes a place of the key half."""
    _, geom = make(num_levels=2, pool_factor=2, num_strata=2, picks=4, spare=2)
    sq = torch.tensor([[[0.0, 1, 9, 8, 2, 3] * 2]])
    sk = torch.tensor([[[0.0, 5, 9, 1, 6, 0] * 2]])
    got = select(sq, sk, geom)
    coarse = taken_by(got, geom)[0, 0, geom.offset(1) :].unflatten(0, (2, -1))
    # First stratum: 0 by force and 2 by sq, then 4 and 1 by sk. Second: 2 and 3, then 4 and 1.
    assert [row.nonzero()[:, 0].tolist() for row in coarse] == [[0, 1, 2, 4], [1, 2, 3, 4]]


@pytest.mark.parametrize("value", [INF, float("nan")], ids=["inf", "nan"])
def test_infinite_scores_come_first_and_nan_ranks_with_them(value: float) -> None:
    """Fails if NaN sorts below numbers, or displaces the forced entry."""
    _, geom = make(num_levels=2, pool_factor=2, num_strata=1, picks=2, spare=4)
    sq = torch.tensor([[[-1.0, 1, 2, 3, value, INF]]])
    sk = torch.tensor([[[-1.0, 9, 2, 3, INF, value]]])
    got = select(sq, sk, geom)
    assert taken_by(got, geom)[0, 0, geom.offset(1) :].nonzero()[:, 0].tolist() == [0, 4]


def test_all_infinite_scores_take_each_entry_once() -> None:
    """Fails if an entry taken by query score can be taken again by key score when all are +inf."""
    _, geom = make(num_levels=3, pool_factor=2, num_strata=2, picks=6, spare=0)
    scores = torch.full((1, 1, geom.pooled_size), INF)
    got = select(scores, scores, geom)
    assert got.entries[0, 0].unique().numel() == geom.subsequence


@pytest.mark.parametrize("num_strata", [1, 2])
def test_largest_k_takes_every_coarsest_entry(num_strata: int) -> None:
    """Fails if taking all candidates of a level leaves one out or reads past them."""
    _, geom = make(num_levels=3, pool_factor=2, num_strata=num_strata, picks=4, spare=0)
    generator = torch.Generator().manual_seed(0)
    sq, sk = (torch.rand(3, 2, geom.pooled_size, generator=generator) for _ in range(2))
    got = select(sq, sk, geom)
    assert bool(taken_by(got, geom)[..., geom.offset(2) :].all())
    level_one = slice(geom.offset(1), geom.offset(2))
    assert bool((got.row_of_entry[..., level_one] >= 0).all())


def test_rows_of_a_batch_and_heads_are_alone() -> None:
    """Fails if one row's or head's scores reach another's selection."""
    _, geom = make(num_levels=3, pool_factor=4, num_strata=2, picks=4, spare=5)
    generator = torch.Generator().manual_seed(1)
    sq, sk = (torch.rand(3, 2, geom.pooled_size, generator=generator) for _ in range(2))
    together = select(sq, sk, geom)
    for row in range(3):
        for head in range(2):
            at = (slice(row, row + 1), slice(head, head + 1))
            alone = select(sq[at], sk[at], geom)
            assert torch.equal(alone.entries, together.entries[at])
            assert torch.equal(alone.row_of_entry, together.row_of_entry[at])


def test_strata_are_alone() -> None:
    """Fails if a stratum's scores reach another stratum's selection."""
    _, geom = make(num_levels=3, pool_factor=2, num_strata=3, picks=2, spare=6)
    generator = torch.Generator().manual_seed(2)
    sq, sk = (torch.rand(1, 1, geom.num_tokens, generator=generator) for _ in range(2))
    before = select(level_scores(sq, geom), level_scores(sk, geom), geom)
    middle = slice(geom.stratum_size, 2 * geom.stratum_size)
    sq[..., middle], sk[..., middle] = 1 - sq[..., middle], 1 - sk[..., middle]
    after = select(level_scores(sq, geom), level_scores(sk, geom), geom)
    size = geom.stratum_subsequence
    same = [
        torch.equal(*(x.entries[..., s * size : (s + 1) * size] for x in (before, after)))
        for s in range(3)
    ]
    assert same == [True, False, True]
