"""README's lines for a user's model run as they stand there."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import lhcp
from lhcp.testing.ranks import RankPool
from tests import llama

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
ONCE, STEP, FSDP2, DDP, TP, HF, *_ = BLOCKS
(DOCUMENTS,) = [block for block in BLOCKS if "num_docs" in block]
SEQLEN, BATCH, CP = 256, 4, 2

THIRD_AXIS = {
    'cp_size), mesh_dim_names=("dp", "cp"': 'cp_size, 2), mesh_dim_names=("dp", "cp", "tp"',
    "over=mesh": 'over=mesh["dp", "cp"]',
}
"""What a user with tensor parallelism has in the place of README's lines."""


def model_of(attention: Callable[[], nn.Module]) -> llama.Llama:
    """What README calls Model: five layers, so that one is not dense."""
    return llama.make(lambda layer: attention(), torch.float64, num_layers=5)


def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(llama.VOCABULARY, (BATCH, SEQLEN), generator=generator)


def answer(scope: dict[str, Any]) -> tuple[float, float]:
    """The loss, and the norm of a whole gradient."""
    grad: Any = next(scope["model"].parameters()).grad
    whole = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return scope["loss"].item(), whole.norm().item()


def run(group: Any, program: str, dp: int) -> tuple[float, float]:
    """Run README's lines on this rank of dp x CP, or of dp x CP x tp."""
    tp = dist.get_world_size() // (dp * CP)
    mine = tokens().chunk(dp)[dist.get_rank() // (CP * tp)]
    scope: dict[str, Any] = {
        "Model": model_of,
        "dp_size": dp,
        "cp_size": CP,
        "seqlen": SEQLEN,
        "plan": llama.tensor_parallel_plan(),
        "batch": {"input_ids": mine, "labels": mine},
    }
    exec(program.replace('"cuda"', '"cpu"'), scope)
    return answer(scope)


@pytest.fixture(scope="module")
def on_one_rank() -> tuple[float, float]:
    cp, config = lhcp.ContextParallel(), lhcp.LighthouseConfig.fit(SEQLEN, CP)
    model = model_of(lambda: cp.attention(config))
    lhcp.set_mode(model, "lighthouse", dense_layers=(0, 1, -2, -1))
    batch = {"input_ids": tokens(), "labels": tokens()}
    scope = {"cp": cp, "mesh": None, "model": model, "batch": batch}
    exec(STEP, scope)
    return answer(scope)


@pytest.mark.parametrize("stack", ["fsdp2", "ddp", "tp_fsdp2"])
def test_the_lines_of_a_stack_train_as_one_rank(
    ranks: RankPool, stack: str, on_one_rank: tuple[float, float]
) -> None:
    """Fails if a line does not run, or loss and gradient are not those of one rank."""
    program = ONCE + {"fsdp2": FSDP2, "ddp": DDP, "tp_fsdp2": TP + FSDP2}[stack] + STEP
    if stack == "tp_fsdp2":
        for stands, becomes in THIRD_AXIS.items():
            assert stands in program
            program = program.replace(stands, becomes)
    for found in ranks.run(run, 4, program, 1 if stack == "tp_fsdp2" else 2):
        assert found == pytest.approx(on_one_rank, rel=1e-12)


def run_documents(group: Any) -> bool:
    """Run README's lines for packed documents, and hold them against one rank."""
    cp = lhcp.ContextParallel(group)
    config = lhcp.LighthouseConfig.fit(SEQLEN, 4)
    cu_seqlens = torch.tensor([0, 40, 111, SEQLEN, SEQLEN + 150, 2 * SEQLEN], dtype=torch.int32)
    q, k, v = (torch.randn(2, SEQLEN, 2, 8, dtype=torch.float64) for _ in range(3))
    for x in (q, k, v):
        dist.broadcast(x, 0, group=group)
    seen: list[Any] = []
    scope: dict[str, Any] = {
        "cp": cp,
        "batch": {"input_ids": tokens()[:2], "labels": tokens()[:2]},
        "cu_seqlens": cu_seqlens,
        "model": lambda *given: seen.append(given),
        "attend": cp.attention(config),
        **{name: lhcp.shard(x, group) for name, x in zip("qkv", (q, k, v), strict=True)},
    }
    exec(DOCUMENTS, scope)
    whole = lhcp.lighthouse_attention(q, k, v, config=config, cu_seqlens=cu_seqlens)
    (ids, positions, bounds), *_ = seen
    assert torch.equal(bounds, cu_seqlens) and ids.shape == (2, positions.shape[1])
    return torch.allclose(scope["o"], lhcp.shard(whole, group), rtol=1e-12, atol=1e-12)


def test_the_lines_for_packed_documents_run(ranks: RankPool) -> None:
    """Fails if a line does not run, or a layer's output is not that of one rank."""
    assert all(ranks.run(run_documents, 4))
