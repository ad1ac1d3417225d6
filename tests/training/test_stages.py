"""Stages and learning rates are pure functions of the step."""

from itertools import pairwise

import pytest

from lhcp.training.stages import OptimConfig, Stage, stage_at, total_steps

STAGES = (
    Stage(name="a", mode="lighthouse", steps=3),
    Stage(name="none", mode="lighthouse", steps=0),
    Stage(name="b", mode="dense", steps=2),
)


def test_stages_follow_one_another() -> None:
    assert total_steps(STAGES) == 5
    assert [stage_at(STAGES, i).name for i in range(5)] == ["a", "a", "a", "b", "b"]
    with pytest.raises(ValueError, match="steps 0 to 4"):
        stage_at(STAGES, 5)


@pytest.mark.parametrize("decay", ["constant", "cosine", "linear"])
def test_rate(decay: str) -> None:
    config = OptimConfig(lr=1.0, warmup_steps=4, decay=decay, final_fraction=0.1)
    rates = [config.rate(step, 20) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates == [config.rate(step, 20) for step in range(20)]
    assert rates[-1] == pytest.approx(1.0 if decay == "constant" else 0.1)
    assert all(a >= b for a, b in pairwise(rates[4:]))
    if decay != "constant":
        assert config.rate(4 + 15 // 2, 20) == pytest.approx(0.55, abs=0.05)


def test_rate_without_warmup() -> None:
    assert OptimConfig(lr=0.5, warmup_steps=0).rate(0, 1) == 0.5
    assert OptimConfig(lr=0.5, warmup_steps=0, decay="linear").rate(0, 1) == 0.5


@pytest.mark.parametrize(
    "broken", [{"lr": 0.0}, {"warmup_steps": -1}, {"final_fraction": 1.5}, {"clip": 0.0}]
)
def test_broken_fields_are_named(broken: dict[str, float]) -> None:
    (name,) = broken
    with pytest.raises(ValueError, match=name):
        OptimConfig(**broken)
