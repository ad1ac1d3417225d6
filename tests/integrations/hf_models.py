"""Small models of transformers, randomly initialised, and a batch for them."""

from typing import Any

import pytest
import torch
from torch import Tensor

import lhcp
from lhcp.integrations import hf
from lhcp.testing.inputs import small_config

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


def attached(family: str = "Llama", **options: Any) -> tuple[Any, lhcp.ContextParallel]:
    model, cp = make(family, torch.float32, **options), lhcp.ContextParallel()
    hf.attach(model, cp, CONFIG)
    return model, cp
