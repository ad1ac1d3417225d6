"""`LighthouseConfig.fit` and `padded_length`: what they propose keeps every rule at once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lhcp import LighthouseConfig
from lhcp.config import Scorer
from lhcp.lighthouse.geometry import Geometry

some = settings(max_examples=150, derandomize=True, deadline=None)
sizes = {
    "num_levels": st.integers(2, 4),
    "pool_factor": st.integers(2, 5),
    "topk": st.integers(1, 4096),
    "num_strata": st.integers(1, 64),
}


@some
@given(
    seqlen=st.integers(1, 200_000),
    world_size=st.integers(1, 33),
    scorer=st.sampled_from(("norm", "dilated")),
    window=st.integers(1, 300),
    wishes=st.fixed_dictionaries(sizes),
)
def test_what_is_proposed_runs_in_both_layouts(
    seqlen: int, world_size: int, scorer: Scorer, window: int, wishes: dict[str, int]
) -> None:
    """Fails if a rule is forgotten: of the length, the strata, topk, the layout or the scorer."""
    config = LighthouseConfig.fit(
        seqlen, world_size, scorer=scorer, scorer_window=4 * window, **wishes
    )
    length = config.padded_length(seqlen)
    for num_chunks in {1 if world_size == 1 else 2, 1}:
        Geometry.local(config, length // world_size, world_size, num_chunks, 0)
    assert (config.num_levels, config.pool_factor) == (wishes["num_levels"], wishes["pool_factor"])
    # No config for these ranks needs less padding: all cut into whole windows of every chunk.
    unit = world_size * (2 if world_size > 1 else 1) * config.coarsest_window
    assert seqlen <= length < seqlen + unit or length == 2 * unit


def test_a_wish_that_fits_is_kept() -> None:
    """Fails if a field is changed for no reason."""
    wish = LighthouseConfig()
    assert LighthouseConfig.fit(98_304, 8) == wish
    assert LighthouseConfig.fit(2**20, 8, num_levels=4, topk=4096) == LighthouseConfig(
        num_levels=4, topk=4096
    )


def test_three_ranks_get_strata_and_topk_that_agree() -> None:
    """Fails if the strata are offered that topk forbids: 18 of 1536."""
    config = LighthouseConfig.fit(98_304, 3)
    assert (config.num_strata, config.topk, config.padded_length(98_304)) == (12, 1536, 98_304)


def test_a_short_sequence_is_shortened() -> None:
    """Fails if topk is so large that the sub-sequence is the sequence."""
    config = LighthouseConfig.fit(1000)
    assert config.subsequence_length(config.padded_length(1000)) < 1000


def test_strata_that_the_ranks_forbid_offer_a_topk_with_them() -> None:
    """Fails if what check_chunks offers is refused by the constructor."""
    with pytest.raises(ValueError, match="num_strata=16: must be a multiple of 6") as raised:
        LighthouseConfig().check_chunks(6)
    assert "num_strata=12 or num_strata=18, topk=1548" in str(raised.value)
    LighthouseConfig(num_strata=18, topk=1548).check_chunks(6)


@some
@given(seqlen=st.integers(1, 10_000), picks=st.integers(1, 4), num_strata=st.integers(1, 12))
def test_padded_length_is_the_shortest_that_fits(seqlen: int, picks: int, num_strata: int) -> None:
    """Fails if a shorter length of at least seqlen tokens is accepted, or this one is not."""
    config = LighthouseConfig(
        num_levels=2, pool_factor=3, topk=2 * picks * num_strata, num_strata=num_strata
    )
    length = config.padded_length(seqlen)
    config.check_seqlen(length)
    for shorter in range(seqlen, length):
        with pytest.raises(ValueError, match="seqlen="):
            config.check_seqlen(shorter)


def test_padded_length_of_the_dilated_scorer_cuts_into_its_blocks() -> None:
    """Fails if the scorer's rule, by which not every multiple fits, is left out."""
    config = LighthouseConfig(
        num_levels=2, pool_factor=2, topk=4, num_strata=2, scorer="dilated", scorer_window=12
    )
    assert config.padded_length(50) == 72
    config.check_seqlen(72)


@pytest.mark.parametrize("broken", [{"seqlen": 0}, {"world_size": 0}, {"topk": 0}, {"levels": 3}])
def test_wishes_that_nothing_fits_are_named(broken: dict[str, int]) -> None:
    (name,) = broken
    with pytest.raises((TypeError, ValueError), match=name):
        LighthouseConfig.fit(**{"seqlen": 1000} | broken)
