"""The layer: its modes, torch.compile and checkpointing around it, and the ranks' agreement."""

import shutil
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import lhcp
from lhcp.comm.layout import LayoutName
from lhcp.layer.module import Mode
from lhcp.testing.inputs import qkv, small_config
from lhcp.testing.ranks import RankPool
from tests.cases import LAYOUTS

CONFIG, SEQLEN = small_config(num_strata=8)
MODES: tuple[Mode, ...] = ("lighthouse", "dense")
Attend = Callable[..., Tensor]


def inputs(group: Any, layout: LayoutName = "zigzag") -> tuple[Tensor, ...]:
    whole = qkv(SEQLEN, num_heads=4, num_kv_heads=2, dtype=torch.float32, seed=3)
    return tuple(lhcp.shard(x, group, layout=layout) for x in whole)


def answers(attend: Attend, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> list[Tensor]:
    """Output and gradients."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    o = attend(*leaves)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def around(group: Any, how: str, mode: Mode, rotation: str, layout: LayoutName) -> bool:
    """Whether a layer has the same bits inside of torch.compile or checkpoint as outside."""
    layer = lhcp.LighthouseAttention(CONFIG, group, rotation=rotation, layout=layout)
    layer.mode = mode
    tensors = inputs(group, layout)
    plain = answers(layer, *tensors)
    if how == "checkpoint":
        return equal(
            answers(lambda *x: checkpoint(layer, *x, use_reentrant=False), *tensors), plain
        )
    torch._dynamo.reset()

    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Something to trace on both sides of the layer."""
        return layer(q * 1.0, k, v) + 0.0

    compiled = torch.compile(twice, fullgraph=True, backend=how)
    return equal(answers(compiled, *tensors), plain)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["aot_eager", "checkpoint"])
def test_same_bits_on_one_rank(how: str, mode: Mode, one_thread: None) -> None:
    """Fails if a graph breaks, or what is recomputed or traced differs from what ran."""
    assert around(None, how, mode, "auto", "zigzag")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rotation", ["auto", "p2p", "allgather", "alltoall"])
@pytest.mark.parametrize("how", ["checkpoint", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_same_bits_on_two_ranks(ranks: RankPool, how: str, rotation: str, mode: Mode) -> None:
    """Fails if a recomputation sends other messages, or messages are traced out of order."""
    for layout in LAYOUTS:
        assert ranks.run(around, 2, how, mode, rotation, layout) == [True] * 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rotation", ["hybrid", "hybrid_context_first"])
@pytest.mark.parametrize("how", ["checkpoint", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_same_bits_on_two_nodes(ranks: RankPool, how: str, rotation: str, mode: Mode) -> None:
    """Fails as above, where heads are exchanged around a ring of fewer ranks."""
    arguments = (around, 4, how, mode, rotation, "zigzag")
    assert ranks.run(*arguments, num_nodes=2) == [True] * 4


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("mode", MODES)
def test_same_values_when_compiled_by_inductor(mode: Mode, one_thread: None) -> None:
    """Fails if generated code around the operators reads them in another layout."""
    assert around(None, "inductor", mode, "auto", "zigzag")


def test_modes_are_the_two_functions() -> None:
    """Fails if a mode passes on another scale, layout or score than its function takes."""
    q, k, v, _ = inputs(None)
    score_q, score_k = q * k[:, :, :1], k + 1
    layer = lhcp.LighthouseAttention(CONFIG, scale=0.7, backend="math")
    scores = {"score_q": score_q, "score_k": score_k}
    ours = layer(q, k, v, **scores)
    theirs = lhcp.lighthouse_attention(q, k, v, config=CONFIG, scale=0.7, backend="math", **scores)
    assert torch.equal(ours, theirs)
    selection = lhcp.select(q, k, config=CONFIG, **scores)
    assert torch.equal(layer(q, k, v, selection=selection), theirs)
    layer.mode = "dense"
    assert torch.equal(layer(q, k, v), lhcp.ring_attention(q, k, v, scale=0.7, backend="math"))
    assert not list(layer.parameters()) and not layer.state_dict()


def test_a_call_may_have_a_scale_of_its_own() -> None:
    """Fails if a call's scale is not taken, in either mode, or is kept for the next call."""
    q, k, v, _ = inputs(None)
    layer = lhcp.LighthouseAttention(CONFIG, scale=0.7, backend="math")
    attend = partial(lhcp.lighthouse_attention, q, k, v, config=CONFIG, backend="math")
    dense = partial(lhcp.ring_attention, q, k, v, backend="math")
    for function in (attend, dense):
        for scale in (0.3, None, 0.4):
            theirs = function(scale=0.7 if scale is None else scale)
            assert torch.equal(layer(q, k, v, scale=scale), theirs)
        layer.mode = "dense"


def test_a_layer_without_a_config_is_dense() -> None:
    layer = lhcp.LighthouseAttention(None)
    assert layer.mode == "dense"
    q, k, v, _ = inputs(None)
    assert torch.equal(layer(q, k, v), lhcp.ring_attention(q, k, v))


def mistakes_then_right(group: Any, culprit: int, mode: Mode) -> tuple[list[str], bool]:
    """Call a layer wrongly on one rank, twice, then rightly on all: the errors, and success."""
    layer = lhcp.LighthouseAttention(CONFIG, group, layout="contiguous")
    layer.mode = mode
    q, k, v, _ = inputs(group, "contiguous")
    bad = q.bfloat16() if group.rank() == culprit else q
    said = []
    for _ in range(2):
        try:
            layer(bad, k, v)
        except (TypeError, ValueError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said, bool(layer(q, k, v).isfinite().all())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("culprit", [0, 2])
def test_a_mistake_is_said_on_every_rank_until_it_is_put_right(
    ranks: RankPool, culprit: int, mode: Mode
) -> None:
    """Fails if only the culprit raises, or if the layer takes a failed call for an agreement."""
    for rank, (said, works) in enumerate(ranks.run(mistakes_then_right, 4, culprit, mode)):
        assert len(said) == 2 and works
        for error in said:
            assert "must have one dtype" in error
            others = f"ValueError: rank {culprit} of 4 cannot go on: TypeError"
            assert error.startswith("TypeError: q" if rank == culprit else others)


def normalised(x: Tensor, spread: float) -> Tensor:
    """Rows whose squared norms have this standard deviation over their mean, more or less."""
    sizes = 1 + spread * torch.linspace(-1, 1, x.shape[1]).view(1, -1, 1, 1) * 3**0.5
    return x / x.norm(dim=-1, keepdim=True) * sizes.sqrt()


@pytest.mark.parametrize("which", ["q", "k"])
@pytest.mark.parametrize(("spread", "warns"), [(5e-4, True), (2e-3, False)])
def test_a_layer_warns_of_constant_scores_once(which: str, spread: float, warns: bool) -> None:
    """Fails if a model that normalises q and k selects by rounding, and nobody hears of it."""
    q, k, v, _ = inputs(None)
    q, k = (normalised(q, spread), k) if which == "q" else (q, normalised(k, spread))
    layer = lhcp.LighthouseAttention(CONFIG)
    for expected in (warns, False):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            layer(q, k, v)
        said = [str(w.message) for w in heard if f"the scores of {which}, " in str(w.message)]
        assert len(said) == expected


def test_a_layer_looks_at_what_is_scored() -> None:
    """Fails if scores given in their place, padding, or a dense layer are warned of."""
    q, k, v, _ = inputs(None)
    nq, nk = normalised(q, 0), normalised(k, 0)
    valid = torch.ones(q.shape[:2], dtype=torch.bool)
    valid[:, SEQLEN // 2 :] = False
    # Norms of padding, far from the others', do not hide that these are constant.
    pq, pk = (torch.where(valid[..., None, None], x, 9.0) for x in (nq, nk))
    dense = lhcp.LighthouseAttention(CONFIG)
    dense.mode = "dense"
    calls: list[tuple[bool, Callable[[], Tensor]]] = [
        (False, lambda: dense(nq, nk, v)),
        (False, lambda: lhcp.LighthouseAttention(CONFIG)(nq, nk, v, score_q=q, score_k=k)),
        (True, lambda: lhcp.LighthouseAttention(CONFIG)(q, k, v, score_q=nq, score_k=nk)),
        (True, lambda: lhcp.LighthouseAttention(CONFIG)(pq, pk, v, valid=valid)),
    ]
    for expected, call in calls:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            call()
        assert any("squared norms" in str(w.message) for w in heard) == expected
