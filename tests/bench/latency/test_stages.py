"""The latency bench's stages, interpreted on a CPU: right ones pass, wrong ones have no time."""

from dataclasses import replace

import pytest
import torch

from bench.latency.stages import Shape, TimedStage, Wrong, assert_same_bits, build
from lhcp.lighthouse.geometry import Geometry

GEOM = Geometry(256, 2, 2, 3, 4, 4, True)
NAMES = ("pool", "select", "gather", "scatter", "scatter_backward", "gather_backward")


@pytest.fixture(scope="module")
def stages() -> dict[str, TimedStage]:
    torch.manual_seed(0)
    return build(GEOM, Shape(num_heads=2, num_kv_heads=1, head_dim=16, device="cpu"))


@pytest.mark.parametrize("name", [*NAMES, "scatter_edges", "edge_grads"])
def test_a_stage_is_the_torch_path(stages: dict[str, TimedStage], name: str) -> None:
    """Fails if a right stage is refused, or a wrong one gets a time."""
    stage = stages[name]
    stage.check(name)
    assert_same_bits(name, stage.run)
    wanted = tuple(stage.want())
    wrong = (wanted[0].clone(), *wanted[1:])
    wrong[0].view(-1)[-1] += 1
    with pytest.raises(Wrong, match=f"{name} is not the torch path's"):
        replace(stage, got=lambda: wrong).check(name)
