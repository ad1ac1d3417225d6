"""torch.compile in one graph around a transformer block, in both modes, on every device."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import lhcp
from lhcp.comm.mesh import as_ranks
from lhcp.ring.heads import SHARE_HEADS, TWO_AXES
from lhcp.testing.inputs import qkv, small_config
from lhcp.testing.ranks import RankPool
from lhcp.testing.tolerance import assert_within_budget
from tests.devices import PLACES, Place
from tests.transformer import answer, attention_of, exact_answer, make_block


@pytest.fixture(autouse=True)
def no_graphs_left():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("place", PLACES)
def test_one_graph_in_both_modes_and_none_stale(place: Place) -> None:
    block, inputs, dout = make_block(place)
    compiled = torch.compile(block, backend=place.compiler, fullgraph=True)
    outputs = []
    for mode in ("lighthouse", "dense", "lighthouse"):
        attention_of(block).mode = mode
        plain, exact = answer(block, inputs, dout), exact_answer(block, inputs, dout)
        got = answer(compiled, inputs, dout)
        for i, results in enumerate(zip(got, plain, exact, strict=True)):
            assert_within_budget(f"{mode}, result {i}", *results)
        outputs.append(got[0])
    # The modes differ by far more than rounding, so a graph kept from the other one would show.
    far = (outputs[1] - outputs[0]).abs().max()
    assert far > 0.1
    assert (outputs[2] - outputs[0]).abs().max() < far / 10


@pytest.mark.parametrize("place", PLACES)
def test_compiled_block_takes_new_inputs_without_compiling_anew(place: Place) -> None:
    block, inputs, dout = make_block(place)
    compiled = torch.compile(block, backend=place.compiler, fullgraph=True)
    answer(compiled, inputs, dout)
    other = (torch.randn_like(inputs[0]).requires_grad_(), *inputs[1:])
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = answer(compiled, other, dout)
    plain, exact = answer(block, other, dout), exact_answer(block, other, dout)
    for i, results in enumerate(zip(got, plain, exact, strict=True)):
        assert_within_budget(f"result {i}", *results)


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
@pytest.mark.parametrize("mode", ["lighthouse", "dense"])
def test_another_length_compiles_or_is_traced_with(mode: str, dynamic: bool | None) -> None:
    """Fails if a symbolic length is refused by a table of ours, or in the words of an error."""
    config = lhcp.LighthouseConfig(num_levels=3, pool_factor=2, topk=8, num_strata=2)
    layer = lhcp.LighthouseAttention(config, backend="cpu")
    layer.mode = mode  # type: ignore[assignment]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for seqlen in (64, 128, 96):
        q, k, v, do = qkv(seqlen, num_kv_heads=2, dtype=torch.float32)
        results = []
        for attend in (layer, compiled):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            out = attend(*leaves)
            results.append((out, *torch.autograd.grad(out, leaves, do)))
        for ours, theirs in zip(*results, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)


def lengths_across_ranks(group: Any, dynamic: bool | None) -> bool:
    same = True
    for mode in ("lighthouse", "dense"):
        torch._dynamo.reset()
        config = lhcp.LighthouseConfig(num_levels=3, pool_factor=2, topk=8, num_strata=4)
        layer = lhcp.LighthouseAttention(config, group, backend="cpu")
        layer.mode = mode  # type: ignore[assignment]
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        for seqlen in (128, 256, 192):
            whole = qkv(seqlen, num_kv_heads=2, dtype=torch.float32)
            q, k, v, _ = (lhcp.shard(x, group) for x in whole)
            same &= torch.allclose(compiled(q, k, v), layer(q, k, v), atol=1e-6)
    return same


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_another_length_across_ranks(ranks: RankPool, dynamic: bool | None) -> None:
    """Fails if the choice of a rotation, which depends on the length, is asked for a symbol."""
    assert ranks.run(lengths_across_ranks, 2, dynamic) == [True, True]


def compile_with_another_scale(group: Any, what: str) -> str:
    """Compile a layer that means something else on rank 1, at equal sizes; return what is said."""
    torch._dynamo.reset()
    own = dist.new_group(range(4))
    config, seqlen = small_config(num_strata=8)
    if own.rank() == 1 and what == "config.topk":
        config = dataclasses.replace(config, topk=2 * config.topk)
    scale = 0.7 if own.rank() == 1 and what == "scale" else 0.5
    layer = lhcp.LighthouseAttention(config, own, scale=scale)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    q, k, v, _ = (lhcp.shard(x, own) for x in qkv(2 * seqlen, num_kv_heads=2))
    try:
        compiled(q, k, v)
    except Exception as error:
        # Dynamo wraps what a constant of it raises.
        return f"{error} {error.__cause__}"
    return "nothing said"


def run_a_graph_at_other_lengths(group: Any, mode: str, rotation: str, dynamic: bool) -> list[str]:
    """Run a compiled layer at equal lengths, then at another on rank 1; return what is said.

    The third lengths are equal again: that the ranks go on is part of it.
    """
    torch._dynamo.reset()
    if rotation in TWO_AXES:
        own = as_ranks(init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local")))
    else:
        own = as_ranks(dist.new_group(range(4)))
    config, seqlen = small_config(num_strata=8)
    layer = lhcp.LighthouseAttention(config, own, rotation=rotation)
    layer.mode = mode  # type: ignore[assignment]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    said = []
    for times in (1, 3 if own.rank == 1 else 2, 4):
        q, k, v, _ = (lhcp.shard(x, own) for x in qkv(times * seqlen, num_kv_heads=4))
        try:
            out = compiled(q.requires_grad_(), k, v)
            out.sum().backward()
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize(
    "dynamic", [pytest.param(False, marks=pytest.mark.slow), True], ids=["static", "dynamic"]
)
@pytest.mark.parametrize(
    ("mode", "rotation"),
    [
        *(("lighthouse", "p2p"), ("dense", "allgather"), ("dense", "alltoall")),
        *(("lighthouse", "hybrid"), ("dense", "hybrid_context_first")),
    ],
)
def test_lengths_of_graphs_are_compared(
    ranks: RankPool, mode: str, rotation: str, dynamic: bool
) -> None:
    """Fails if ranks whose graphs run with other lengths read one another's messages."""
    for first, other, third in ranks.run(run_a_graph_at_other_lengths, 4, mode, rotation, dynamic):
        assert first == "" and third == ""
        assert "ranks were asked for different things: " in other and "on rank 1" in other
        assert ("exchanged by each rank" if rotation in SHARE_HEADS else "seqlen: ") in other


@pytest.mark.parametrize("what", ["scale", "config.topk"])
def test_ranks_that_trace_for_different_things_are_told_so(ranks: RankPool, what: str) -> None:
    """Fails if compiled layers of equal sizes and other meanings attend to one another."""
    for said in ranks.run(compile_with_another_scale, 4, what):
        assert f"ranks were asked for different things: {what}: " in said and "on rank 1" in said
