"""Layers of two ranks as CUDA graphs, messages included. Wants two GPUs."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import lhcp
from lhcp.comm.mesh import Ranks
from lhcp.testing.inputs import qkv, small_config
from lhcp.testing.ranks import RankPool
from tests.gpu.problems import NAMES


@pytest.fixture(scope="module")
def two_gpus() -> Iterator[RankPool]:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    pool = RankPool(2, by_nccl=True)
    yield pool
    pool.close()


def differing(
    ranks: Ranks, rotation: str, mode: Any, device: str
) -> tuple[list[str], Counter[str]]:
    """Take steps with a layer and with one that has graphs; return which bits differ, of which
    step, and what ran without a graph."""
    config, seqlen = small_config(pool_factor=4, num_strata=4, picks=8)
    # Torch's flash adds in one order where it is asked to.
    backend = "flash" if device == "cuda" else "cpu"
    plain, by_graph = (
        lhcp.LighthouseAttention(config, ranks, rotation=rotation, backend=backend)
        for _ in range(2)
    )
    plain.mode = by_graph.mode = mode
    graphs = lhcp.graphed([by_graph], always=True)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": dtype, "device": device}
    found = []
    torch.use_deterministic_algorithms(True)
    try:
        for step in range(5):
            whole = qkv(seqlen, seed=step, **sizes)
            q, k, v, dout = (lhcp.shard(x, ranks) for x in whole)
            leaves = [x.requires_grad_() for x in (q, k, v)]
            answers = []
            for layer in (plain, by_graph):
                out = layer(*leaves)
                answers.append((out.detach(), *torch.autograd.grad(out, leaves, dout)))
            pairs = zip(NAMES, *answers, strict=True)
            found += [f"{name} of step {step}" for name, a, b in pairs if not torch.equal(a, b)]
    finally:
        torch.use_deterministic_algorithms(False)
        graphs.release()
    return found, graphs.eager


@pytest.mark.parametrize("mode", ["lighthouse", "dense"])
@pytest.mark.parametrize("num_nodes", [2, 1], ids=["2 nodes of 1", "1 node of 2"])
@pytest.mark.parametrize("rotation", ["hybrid", "hybrid_context_first", "hierarchical"])
def test_rotations_of_nodes_are_captured(
    two_gpus: RankPool, rotation: str, num_nodes: int, mode: str
) -> None:
    """Fails if a capture refuses an exchange of heads or a ring, or a graph replays another's."""
    for found, eager in two_gpus.run(differing, 2, rotation, mode, "cuda", num_nodes=num_nodes):
        assert not found
        assert set(eager) == {"first calls"}
