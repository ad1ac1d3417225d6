"""Models of transformers, randomly initialised, attend across ranks as on one."""

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import lhcp
from lhcp.comm.layout import LayoutName
from lhcp.integrations import hf
from lhcp.layer.module import Mode
from lhcp.testing.inputs import small_config
from lhcp.testing.ranks import RankPool

transformers = pytest.importorskip("transformers")

CONFIG, SEQLEN = small_config(num_strata=8)
VOCABULARY, BATCH = 64, 2
FAMILIES = ("Llama", "Qwen3", "Mistral")


def make(family: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A model of four query heads and two kv heads, the same on every rank."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 4096,
    }
    config = getattr(transformers, f"{family}Config")(**sizes | options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    # Larger than transformers' 0.02, with which attention is nearly uniform and forgives anything.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model.to(dtype)


def batch(seed: int = 1) -> dict[str, Tensor]:
    ids = torch.randint(VOCABULARY, (BATCH, SEQLEN), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def step(group: Any, family: str, mode: Mode, layout: LayoutName = "zigzag", **more: Any) -> Any:
    """Logits of the whole sequence and whole gradients, on the ranks of `group`."""
    cp = lhcp.ContextParallel(group, layout=layout)
    model = make(family)
    # The first layer is dense: equal tokens have equal scores there, and rounding ranks them.
    hf.attach(model, cp, CONFIG, dense_layers=(0,))
    lhcp.set_mode(model, mode, dense_layers=(0,))
    if more.get("recompute"):
        model.gradient_checkpointing_enable()
    model.train()
    part = cp.shard(batch())
    logits = model(**part).logits
    cp.loss(logits, part["shift_labels"], over=group).backward()
    grads = {name: x.grad for name, x in model.named_parameters()}
    if group is not None:
        for grad in grads.values():
            dist.all_reduce(grad, group=group)
            grad /= cp.world_size
    return cp.unshard(logits.detach()), grads


@lru_cache
def on_one_rank(family: str, mode: Mode) -> Any:
    return step(None, family, mode)


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_logits_are_the_models_own(family: str) -> None:
    """Fails if scale, mask, heads or order of axes differ from the model's own attention."""
    for own, dtype, budget in (("sdpa", torch.float64, 1e-13), ("eager", torch.float32, 1e-5)):
        model = make(family, dtype)
        model.set_attn_implementation(own)
        with torch.no_grad():
            expected = model(batch()["input_ids"]).logits
            hf.attach(model, lhcp.ContextParallel(), None)
            found = model(**lhcp.ContextParallel().shard(batch())).logits
        assert (found - expected).norm() <= budget * expected.norm()


@pytest.mark.parametrize("mode", ["lighthouse", "dense"])
@pytest.mark.parametrize(
    ("family", "world_size", "layout", "recompute"),
    [
        ("Llama", 2, "contiguous", False),
        ("Llama", 4, "zigzag", True),
        ("Qwen3", 2, "zigzag", True),
        ("Qwen3", 4, "zigzag", False),
        ("Mistral", 2, "zigzag", False),
    ],
)
def test_logits_and_gradients_are_one_ranks(
    ranks: RankPool, family: str, world_size: int, layout: LayoutName, recompute: bool, mode: Mode
) -> None:
    """Fails if positions, selection, messages or the loss depend on the ranks.

    transformers' norms compute in float32 whatever the model's dtype, so that is the budget.
    """
    expected, grads = on_one_rank(family, mode)
    whole = torch.stack([g.norm() for g in grads.values()]).norm()
    for logits, found in ranks.run(_step_on, world_size, family, mode, layout, recompute):
        assert (logits - expected).norm() <= 1e-6 * expected.norm()
        norm = torch.stack([g.norm() for g in found.values()]).norm()
        assert norm.item() == pytest.approx(whole.item(), rel=1e-6)
        for name, grad in grads.items():
            assert (found[name] - grad).norm() <= 1e-6 * whole, name


def _step_on(group: Any, family: str, mode: Mode, layout: LayoutName, recompute: bool) -> Any:
    return step(group, family, mode, layout, recompute=recompute)
