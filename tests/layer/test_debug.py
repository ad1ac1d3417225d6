"""`debug=True`: every call is compared, and what is not finite is named, on every rank."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import lhcp
from lhcp.comm.trail import calls_in
from lhcp.layer.module import Mode
from lhcp.testing.inputs import qkv, small_config
from lhcp.testing.ranks import RankPool
from tests.layer.graphs import with_graphs

CONFIG, SEQLEN = small_config(num_strata=8)
WORLD, CULPRIT = 4, 2
MODES: tuple[Mode, ...] = ("lighthouse", "dense")


def two_layers(group: Any, mode: Mode, debug: bool) -> list[lhcp.LighthouseAttention]:
    layers = [
        lhcp.LighthouseAttention(CONFIG, group, rotation="p2p", debug=debug) for _ in range(2)
    ]
    for layer in layers:
        layer.mode = mode
    return layers


def inputs(group: Any) -> list[Tensor]:
    return [lhcp.shard(x, group) for x in qkv(SEQLEN, num_kv_heads=2)[:3]]


def said_of(call: Any) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def astray(group: Any, mode: Mode, what: str, debug: bool) -> tuple[str, bool]:
    """Make calls that all ranks know, the last of them otherwise on one rank.

    Return what that one says, and whether the next is right.
    """
    own = dist.new_group(range(WORLD))
    layers, tensors = two_layers(own, mode, debug), inputs(own)
    starts = [0, 9, SEQLEN]
    given = torch.tensor(starts, dtype=torch.int32)
    others = torch.tensor([0, 10, SEQLEN], dtype=torch.int32)

    def every(cu_seqlens: Tensor | None = given) -> list[Tensor]:
        return [layer(*tensors, cu_seqlens=cu_seqlens) for layer in layers]

    before = every()
    every()
    culprit = own.rank() == CULPRIT
    if what == "scale" and culprit:
        layers[0].scale = 0.3
    if what == "trail":
        # A layer that nobody debugs, whose later documents are not compared.
        silent = lhcp.LighthouseAttention(None, own, rotation="p2p")
        silent(*tensors, cu_seqlens=given)
        silent(*tensors, cu_seqlens=others if culprit else given)
    turn = layers[::-1] if what == "turn" and culprit else layers
    documents = others if what == "cu_seqlens" and culprit else given
    if what == "no documents" and culprit:
        documents = None
    said = said_of(lambda: turn[0](*tensors, cu_seqlens=documents))
    layers[0].scale = None
    if what == "trail" or (what == "turn" and not debug):
        return said, True
    return said, all(map(torch.equal, every(), before))


NAMED = {
    "scale": "scale: None on rank 0, 0.3 on rank 2",
    "turn": "layer, in the order of first calls: 1 on rank 0, 2 on rank 2",
    "cu_seqlens": "cu_seqlens: 2 documents of digest",
    "no documents": "cu_seqlens: 2 documents of digest",
    "trail": "trail of the calls before: ",
}


@pytest.mark.parametrize("what", list(NAMED))
@pytest.mark.parametrize("mode", MODES)
def test_a_rank_that_changes_alone_is_named_at_that_call(
    ranks: RankPool, mode: Mode, what: str
) -> None:
    """Fails, also by hanging, if a known call is not compared, or the next one is another's."""
    for said, right in ranks.run(astray, WORLD, mode, what, True):
        assert said.startswith(f"ranks were asked for different things: {NAMED[what]}")
        assert "Ranks that differ from rank 0: [2] of 4" in said and right
        assert what == "no documents" or said.count(" on rank 0") == 1


@pytest.mark.parametrize("what", ["turn", "cu_seqlens", "trail"])
def test_without_debug_known_calls_are_not_compared(ranks: RankPool, what: str) -> None:
    """Fails if every user pays for what is for hunting an error."""
    assert [said for said, _ in ranks.run(astray, WORLD, "dense", what, False)] == [""] * WORLD


def debug_on_one(group: Any) -> str:
    own = dist.new_group(range(WORLD))
    tensors, debug = inputs(own), own.rank() == CULPRIT
    return said_of(lambda: lhcp.ring_attention(*tensors, group=own, debug=debug))


def test_debug_on_one_rank_alone_is_named(ranks: RankPool) -> None:
    """Fails if the ranks that are debugged wait for posts of the others."""
    for said in ranks.run(debug_on_one, WORLD):
        assert "different things: debug: False on rank 0, True on rank 2" in said


def spoilt(group: Any, mode: Mode, name: str, value: float) -> tuple[str, str]:
    """Call functions with one bad number on one rank, twice; return what they say."""
    own = dist.new_group(range(WORLD))
    tensors = dict(zip("qkv", inputs(own), strict=True))

    def call() -> Tensor:
        if mode == "dense":
            return lhcp.ring_attention(**tensors, group=own, debug=True)
        return lhcp.lighthouse_attention(**tensors, config=CONFIG, group=own, debug=True)

    call()
    good = tensors[name]
    if own.rank() == CULPRIT:
        tensors[name] = good.index_fill(1, torch.tensor(3), value)
    said = said_of(call)
    tensors[name] = good
    return said, said_of(call)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "value"), [("q", float("inf")), ("v", float("nan"))])
def test_an_input_that_is_not_finite_is_named_on_every_rank(
    ranks: RankPool, mode: Mode, name: str, value: float
) -> None:
    """Fails if others hang or go on, or if a rank's own error does not say where."""
    for rank, (said, after) in enumerate(ranks.run(spoilt, WORLD, mode, name, value)):
        own = f"{name} of rank 2 of 4 has "
        assert said.startswith(own if rank == CULPRIT else "rank 2 of 4 cannot go on: ValueError: ")
        assert own in said and f"the first {value} at [0, 3, 0, 0]" in said and after == ""


def overflowing(group: Any, mode: Mode) -> tuple[str, str]:
    """Call a layer whose logits overflow on one rank alone."""
    own = dist.new_group(range(WORLD))
    layer = two_layers(own, mode, True)[0]
    q, k, v = (x.float() for x in inputs(own))
    large = q * 1e30 if own.rank() == CULPRIT else q
    return said_of(lambda: layer(large, k * 1e30, v)), said_of(lambda: layer(q, k, v))


# What a chunk's last entries owe goes to the next chunks, 3 and 6 after the culprit's 2 and 5.
@pytest.mark.parametrize(("mode", "bad"), [("dense", {2}), ("lighthouse", {1, 2, 3})])
def test_an_output_that_is_not_finite_is_named_on_every_rank(
    ranks: RankPool, mode: Mode, bad: set[int]
) -> None:
    """Fails if numbers that an attention makes bad go on into the model, on any rank."""
    for rank, (said, after) in enumerate(ranks.run(overflowing, WORLD, mode)):
        first = rank if rank in bad else min(bad)
        own = f"the output of rank {first} of 4 has "
        told = f"rank {first} of 4 cannot go on: ValueError: {own}"
        assert said.startswith(own if rank in bad else told) and after == ""


@pytest.mark.parametrize("mode", MODES)
def test_one_rank_looks_for_bad_numbers_where_it_is_debugged(mode: Mode) -> None:
    """Fails if a model on one GPU is not helped, or if who does not debug pays."""
    q, k, v = inputs(None)
    bad = k.index_fill(1, torch.tensor(5), torch.nan)
    for debug in (False, True):
        layer = two_layers(None, mode, debug)[0]
        layer(q, k, v)
        said = said_of(lambda attend=layer: attend(q, bad, v))
        assert ("k of rank 0 of 1 has " in said) == debug


def test_a_graph_is_not_taken_where_each_call_is_looked_at() -> None:
    """Fails if a graph hides calls that are to be looked at."""
    layer = two_layers(None, "lighthouse", True)[0]
    graphs, tensors = with_graphs(layer), [x.requires_grad_() for x in inputs(None)]
    for _ in range(4):
        layer(*tensors)
    assert graphs.eager == {"debugging looks at each call": 4}


def traced(group: Any, mode: Mode) -> tuple[list[str], bool]:
    """Trace a layer that is debugged; return what is warned of, and whether it is right."""
    torch._dynamo.reset()
    own = dist.new_group(range(WORLD))
    layer, tensors = two_layers(own, mode, True)[0], inputs(own)
    with pytest.warns(UserWarning, match="part of a graph") as heard:
        out = torch.compile(layer, backend="eager", fullgraph=True)(*tensors)
    return [str(w.message) for w in heard], torch.equal(out, layer(*tensors))


@pytest.mark.parametrize("mode", MODES)
def test_what_is_traced_says_that_it_is_not_looked_at(ranks: RankPool, mode: Mode) -> None:
    """Fails if a compiled layer breaks, or passes for one that is looked at."""
    for said, right in ranks.run(traced, WORLD, mode):
        assert len(said) == 1 and right


def gradients(group: Any, mode: Mode, recomputed: bool) -> tuple[bool, list[int]]:
    """Whether gradients are the bits of those without debug; the calls that ranks counted."""
    own, found, counts = dist.new_group(range(WORLD)), [], []
    for debug in (False, True):
        layers = two_layers(own, mode, debug)
        before = calls_in(own).count
        q, k, v = (x.requires_grad_() for x in inputs(own))
        x = q
        for layer in layers:
            x = checkpoint(layer, x, k, v, use_reentrant=False) if recomputed else layer(x, k, v)
        found.append(torch.autograd.grad(x.sum(), (q, k, v)))
        counts.append(calls_in(own).count - before)
    return all(map(torch.equal, *found)), counts


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_as_without(ranks: RankPool, mode: Mode, recomputed: bool) -> None:
    """Fails if looking changes a result, or a recomputation's calls are not compared in order."""
    calls = 4 if recomputed else 2
    assert ranks.run(gradients, WORLD, mode, recomputed) == [(True, [calls, calls])] * WORLD
