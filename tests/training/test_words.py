"""Fields that no run can have are refused at the start, in our words."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from lhcp.training.parallel import build
from lhcp.training.run import Run
from lhcp.training.run_checks import check_run

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": -1}, r"seed=-1: must lie in 0 to 2\*\*63 - 1"),
        ({"seed": 1 << 63}, r"seed=9223372036854775808: must lie in"),
        ({"global_batch": 0}, r"global_batch=0: must be at least 1"),
        ({"global_batch": -4}, r"global_batch=-4: must be at least 1"),
        ({"seqlen": 0}, r"seqlen=0: must be at least 1"),
        ({"sample_bytes": -1}, r"sample_bytes=-1: must not be negative"),
        ({"timeout": 0.0}, r"timeout=0.0: must be a positive number"),
        ({"timeout": NAN}, r"timeout=nan: must be a positive number"),
        ({"name": ""}, r"name='': the folder .* must have a name; give --out"),
        ({"out": "  "}, r"out='  ', .* must have a name"),
        ({"out": "."}, r"out='.', .* must have a name"),
    ],
)
def test_fields_of_a_run(small_run: Run, change: dict[str, Any], said: str) -> None:
    """Fails if the field is taken, or torch's or numpy's words are all that is said."""
    with pytest.raises(ValueError, match=said):
        check_run(replace(small_run, **change), 1)


def test_bytes_need_256(small_run: Run) -> None:
    """Fails if a byte of the text is an index outside of the embedding, at some step."""
    run = replace(small_run, model=replace(small_run.model, vocab_size=100))
    with pytest.raises(ValueError, match=r"vocab_size=100: .* bytes, which need at least 256"):
        check_run(run, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lr": INF}, "lr=inf: must be positive and finite"),
        ({"lr": NAN}, "lr=nan: must be positive and finite"),
        ({"betas": (0.9, 1.0)}, "betas=.*must be two numbers in 0 to below 1"),
        ({"betas": (0.9, NAN)}, "betas=.*must be two numbers"),
        ({"betas": (0.9,)}, "betas=.*must be two numbers"),
        ({"betas": (-0.1, 0.9)}, "betas=.*must be two numbers"),
        ({"weight_decay": NAN}, "weight_decay=nan: must be finite"),
        ({"weight_decay": INF}, "weight_decay=inf: must be finite"),
    ],
)
def test_fields_of_the_optimiser(small_run: Run, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(small_run.optim, **change)


@pytest.mark.parametrize("name", ["rope_theta", "norm_eps"])
@pytest.mark.parametrize("value", [0.0, -1.0, NAN, INF])
def test_numbers_of_the_model(small_run: Run, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}: must be positive and finite, for"):
        replace(small_run.model, **{name: value})


def test_triton_without_a_gpu(
    one_rank: None, small_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the first step is where a user learns that there is no GPU."""
    run = replace(small_run, kernels="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"kernels='triton': .*need a GPU.*take 'auto' or 'torch'"):
        build(run, torch.device("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    build(run, torch.device("cpu"))
