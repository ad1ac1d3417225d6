"""Layouts, geometry and sharding: integers, permutations, adjoints."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lhcp
from lhcp.comm.layout import LAYOUTS, LayoutName, make_layout
from lhcp.config import LighthouseConfig
from lhcp.lighthouse.geometry import Geometry
from lhcp.testing.ranks import RankPool

worlds = st.integers(1, 9)
layouts = st.sampled_from(LAYOUTS)
some = settings(max_examples=60, derandomize=True, deadline=None)


@some
@given(layout=layouts, world_size=worlds)
def test_chunks_partition_the_sequence(layout: LayoutName, world_size: int) -> None:
    """Fails if a chunk is held twice or by nobody, or if owner is not the inverse of chunks."""
    cut = make_layout(layout, world_size)
    held = [cut.chunks(rank) for rank in range(world_size)]
    assert sorted(c for chunks in held for c in chunks) == list(range(cut.num_chunks))
    for rank, chunks in enumerate(held):
        assert list(chunks) == sorted(chunks)
        assert [cut.owner(c) for c in chunks] == [(rank, slot) for slot in range(len(chunks))]


@some
@given(world_size=st.integers(2, 9))
def test_zigzag_balances_causal_work(world_size: int) -> None:
    """Every rank has as many (query chunk, earlier key chunk) pairs."""
    cut = make_layout("zigzag", world_size)
    assert len({sum(cut.chunks(rank)) for rank in range(world_size)}) == 1


@some
@given(
    num_levels=st.integers(2, 5),
    pool_factor=st.integers(2, 8),
    num_strata=st.integers(1, 12),
    half_picks=st.integers(1, 4),
    spare=st.integers(0, 5),
)
def test_sizes_add_up(
    num_levels: int, pool_factor: int, num_strata: int, half_picks: int, spare: int
) -> None:
    """S = N / p**(L-1) + (L-1) p k, a whole number of strata; offsets are sums of level sizes."""
    p, k = pool_factor, 2 * half_picks * num_strata
    config = LighthouseConfig(num_levels=num_levels, pool_factor=p, topk=k, num_strata=num_strata)
    seqlen = config.min_seqlen + spare * config.seqlen_multiple
    geom = Geometry.local(config, seqlen, 1, 1, 0)
    length = seqlen // p ** (num_levels - 1) + (num_levels - 1) * p * k
    assert config.subsequence_length(seqlen) == geom.subsequence == length
    assert geom.stratum_subsequence * num_strata == length
    sizes = [geom.level_size(level) for level in range(num_levels)]
    assert sizes == [seqlen // p**level for level in range(num_levels)]
    assert [geom.offset(level) for level in range(num_levels + 1)] == [
        sum(sizes[:level]) for level in range(num_levels + 1)
    ]
    assert geom.pyramid_size == geom.num_tokens + geom.pooled_size == sum(sizes)


@some
@given(layout=layouts, world_size=worlds, tokens=st.integers(1, 4))
def test_ranks_of_one_sequence_have_equal_sizes(
    layout: LayoutName, world_size: int, tokens: int
) -> None:
    cut = make_layout(layout, world_size)
    config = LighthouseConfig(
        num_levels=2, pool_factor=2, topk=2 * cut.num_chunks, num_strata=cut.num_chunks
    )
    seqlen = config.min_seqlen * tokens
    local = [
        Geometry.local(config, seqlen // world_size, world_size, cut.chunks_per_rank, rank)
        for rank in range(world_size)
    ]
    assert {geom.subsequence * world_size for geom in local} == {config.subsequence_length(seqlen)}
    assert [geom.has_first for geom in local] == [rank == 0 for rank in range(world_size)]


@some
@given(length=st.integers(1, 40), multiple=st.integers(1, 9), dim=st.integers(0, 1))
def test_padding_reaches_the_next_multiple(length: int, multiple: int, dim: int) -> None:
    x = torch.randn(length, length)
    padded = lhcp.pad_to_multiple(x, multiple, dim, value=7)
    assert padded.shape[dim] % multiple == 0 and 0 <= padded.shape[dim] - length < multiple
    assert torch.equal(padded.narrow(dim, 0, length), x)
    assert bool((padded.narrow(dim, length, padded.shape[dim] - length) == 7).all())


def round_trip(group: Any, layout: LayoutName, dim: int) -> tuple[bool, list[int]]:
    """Shard a whole tensor, unshard it, and report this rank's positions."""
    torch.manual_seed(0)
    shape = [3, 5, 2]
    shape[dim] = 24
    whole = torch.randn(shape)
    part = lhcp.shard(whole, group, dim=dim, layout=layout)
    where = lhcp.positions(24, group, layout=layout)
    assert torch.equal(part, whole.index_select(dim, where))
    same = torch.equal(lhcp.unshard(part, group, dim=dim, layout=layout), whole)
    return same, where.tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_unshard_undoes_shard(ranks: RankPool, layout: LayoutName, world_size: int) -> None:
    for dim in range(3):
        answers = ranks.run(round_trip, world_size, layout, dim)
        assert all(same for same, _ in answers)
        assert sorted(p for _, where in answers for p in where) == list(range(24))


SHAPES = ((1, 8), (8, 1), (4, 1), (1, 4, 1), (1, 8, 3))
"""With axes of one, whose strides are anything; the longest is the sequence."""


def slim_round_trips(group: Any) -> list[bool]:
    found = []
    for shape in SHAPES:
        whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
        dim = shape.index(max(shape))
        part = lhcp.shard(whole, group, dim=dim)
        found.append(torch.equal(lhcp.unshard(part, group, dim=dim), whole))
    return found


def test_axes_of_one_are_gathered(ranks: RankPool) -> None:
    """Fails if the losses of the tokens of one sequence, [1, N / W], cannot be gathered."""
    assert all(all(same) for same in ranks.run(slim_round_trips, 2))


DTYPES = (torch.bool, torch.int16, torch.int64, torch.float8_e4m3fn, torch.bfloat16)


def round_trips(group: Any) -> list[bool]:
    random = torch.randint(0, 2, (2, 64, 3), generator=torch.Generator().manual_seed(0))
    whole = [random.to(dtype) for dtype in DTYPES]
    again = [lhcp.unshard(lhcp.shard(x, group), group) for x in whole]
    pairs = zip(whole, again, strict=True)
    return [x.dtype == y.dtype and torch.equal(x.double(), y.double()) for x, y in pairs]


def test_any_dtype_is_sharded_and_gathered(ranks: RankPool) -> None:
    """Fails if labels, masks or codes cannot be gathered, as by a backend that lacks the dtype."""
    assert all(all(same) for same in ranks.run(round_trips, 2))


@pytest.mark.parametrize("dim", [1, 2, -2])
def test_an_axis_that_is_not_there(dim: int) -> None:
    for function in (lhcp.shard, lhcp.unshard, lambda x, dim: lhcp.pad_to_multiple(x, 8, dim)):
        with pytest.raises(ValueError, match=rf"dim={dim}: a tensor of shape \[64\].*dim=0"):
            function(torch.zeros(64), dim=dim)


@pytest.mark.parametrize("multiple", [0, -8])
def test_nothing_is_a_multiple_of_nothing(multiple: int) -> None:
    with pytest.raises(ValueError, match=f"multiple={multiple}: must be at least 1"):
        lhcp.pad_to_multiple(torch.zeros(1, 5), multiple)


def adjoints(group: Any, layout: LayoutName) -> tuple[float, float, float, float]:
    """This rank's share of both inner products of both adjoint pairs."""
    world, rank = group.size(), group.rank()
    generator = torch.Generator().manual_seed(rank)

    def draw(tokens: int) -> torch.Tensor:
        return torch.randn(2, tokens, generator=generator, dtype=torch.float64)

    # Ranks hold different tensors: an adjoint that forgets a sum over ranks shows.
    part, whole = draw(12).requires_grad_(), draw(12 * world).requires_grad_()
    to_whole, to_part = draw(12 * world), draw(12)
    gathered = lhcp.unshard(part, group, layout=layout)
    (grad_part,) = torch.autograd.grad(gathered, part, to_whole)
    cut = lhcp.shard(whole, group, layout=layout)
    (grad_whole,) = torch.autograd.grad(cut, whole, to_part)
    return (
        (gathered * to_whole).sum().item(),
        (part * grad_part).sum().item(),
        (cut * to_part).sum().item(),
        (whole * grad_whole).sum().item(),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_the_sum_over_ranks(ranks: RankPool, layout: LayoutName) -> None:
    """Fails if unshard's backward selects instead of summing, or shard's is scaled."""
    a, b, c, d = (sum(x) for x in zip(*ranks.run(adjoints, 3, layout), strict=True))
    assert a == pytest.approx(b, abs=1e-12)
    assert c == pytest.approx(d, abs=1e-12)
