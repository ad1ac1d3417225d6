"""The decoder in the layout of Hugging Face's `LlamaForCausalLM`: its names and its settings.

Both are one function. RoPE turns the same pairs (i, i + D/2) in both, so no row moves; q and k,
gate and up are one product here and two there.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lhcp.training.model_config import ModelConfig

WHOLE = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.v.weight": "self_attn.v_proj.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}
"""Of a block: tensors that only change their name."""

OUTSIDE = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
"""The same, outside of the blocks."""


def llama_config(config: ModelConfig, seqlen: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return what config.json says of a decoder.

    Args:
        config: Its sizes.
        seqlen: N, the longest sequence that it was trained on.
        dtype: Of the tensors.
    """
    name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": seqlen,
        "rms_norm_eps": config.norm_eps,
        # transformers 5 reads the second, those before it the first.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        # Bytes have no marks of a text's begin and end.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "dtype": name,
        "torch_dtype": name,
    }


def llama_tensors(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the decoder's tensors by the names and in the shapes that Llama has.

    Args:
        config: Its sizes.
        state: The state dict of a `Decoder`, whole tensors.

    Raises:
        ValueError: the state has a tensor that Llama has no place for, or lacks one.
    """
    left = dict(state)

    def take(name: str) -> Tensor:
        if name not in left:
            raise ValueError(f"{name}: the checkpoint lacks it, and a Llama needs it")
        return left.pop(name)

    found = {theirs: take(ours) for ours, theirs in OUTSIDE.items()}
    if config.tied:
        # There is one tensor then, which the head is bound to when the model is loaded.
        head, embedding = found.pop("lm_head.weight"), found["model.embed_tokens.weight"]
        if not torch.equal(head, embedding):
            raise ValueError("head.weight is not embedding.weight, though the model is tied")
    width, kv_width = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    for layer in range(config.num_layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        found |= {theirs + there: take(ours + here) for here, there in WHOLE.items()}
        q, k = take(ours + "attention.qk.weight").split((width, kv_width))
        gate, up = take(ours + "mlp.gate_up.weight").chunk(2)
        parts = {"self_attn.q_proj": q, "self_attn.k_proj": k, "mlp.gate_proj": gate}
        parts["mlp.up_proj"] = up
        found |= {f"{theirs}{name}.weight": part for name, part in parts.items()}
    if left:
        raise ValueError(
            f"{', '.join(sorted(left))}: Llama has no place for such tensors, so that its logits "
            "would be others; only the decoder of lhcp.training.model can be exported"
        )
    return found
