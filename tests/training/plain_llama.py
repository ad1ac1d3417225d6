"""A Llama of plain torch, from a folder that was exported: what its files must mean to others."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def logits(config: dict[str, Any], weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Return [B, N, V] of ids [B, N], as transformers' modeling_llama computes it."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim, eps = config["head_dim"], config["rms_norm_eps"]
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    turns = config["rope_parameters"]["rope_theta"] ** -exponents
    angles = torch.arange(ids.shape[1], dtype=torch.float64)[:, None] * torch.cat((turns, turns))
    cos, sin = angles.cos(), angles.sin()
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):

        def w(name: str, at: str = f"model.layers.{layer}.") -> Tensor:
            return weights[f"{at}{name}.weight"]

        y = norm(x, w("input_layernorm"), eps)
        q, k, v = (
            (y @ w(f"self_attn.{name}_proj").T).unflatten(-1, (-1, head_dim)).transpose(1, 2)
            for name in "qkv"
        )
        q, k = (a * cos + rotate_half(a) * sin for a in (q, k))
        k, v = (a.repeat_interleave(heads // kv_heads, dim=1) for a in (k, v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + o.transpose(1, 2).flatten(-2) @ w("self_attn.o_proj").T
        y = norm(x, w("post_attention_layernorm"), eps)
        gated = F.silu(y @ w("mlp.gate_proj").T) * (y @ w("mlp.up_proj").T)
        x = x + gated @ w("mlp.down_proj").T
    x = norm(x, weights["model.norm.weight"], eps)
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    out: Tensor = x @ weights[f"{head}.weight"].T
    return out
