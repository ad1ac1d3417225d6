"""Hugging Face transformers: a causal model attends across ranks, through the package's registries.

    hf.attach(model, cp, config, dense_layers=(0, 1, -2, -1))
    batch = cp.shard(batch)
    loss = cp.loss(model(**batch).logits, batch["shift_labels"], over=mesh)
    hf.detach(model)  # the model's own attention again, for generate

The model is changed in place, and no class of the package is. Modules that attend get a child
`lhcp`, without parameters: state dicts and saved models are what they were.
"""

from collections.abc import Collection
from typing import Any

from torch import nn

from lhcp.config import LighthouseConfig
from lhcp.context.context_parallel import ContextParallel
from lhcp.integrations.hf_attention import NAME, HFAttention, attend, make_no_mask
from lhcp.integrations.hf_inputs import Attached
from lhcp.layer.mode import set_mode

INSTALL = "pip install 'lhcp[hf]'"

_CAUSAL_LAYERS = {"full_attention", "sliding_attention"}


def attach(
    model: nn.Module,
    cp: ContextParallel,
    config: LighthouseConfig | None,
    *,
    dense_layers: Collection[int] = (),
) -> None:
    """Let a causal model of transformers attend across the ranks of `cp`.

    Call it on every rank alike, before FSDP2, DDP or torch.compile. From then on the model takes
    what `cp.shard(batch)` returns: `model(**batch)`. `lhcp.set_mode` switches it between the
    stages. Where it normalises q and k, the "norm" scorer is given the projections before that
    norm: rotary embeddings keep norms, so these are the norms that q and k would have without it.
    Packed documents are those of the batch's `cu_seqlens`, which `cp.shard` makes of
    `cu_seq_lens_q`, as of transformers' DataCollatorWithFlattening, or of ids.

    Refused, at the call and on every rank where the call is new: a padding mask (`cp.shard` turns
    it into `valid`), any other mask, a cache, `labels` for the model's own loss, a sliding window
    shorter than the sequence, dropout, rotary frequencies that would differ between ranks
    ("dynamic", "longrope"; `hf_rope`), and whatever else a model asks of its attention.
    `position_ids` must be those of this rank's tokens, in the sequence or, beside `cu_seqlens`, in
    their documents: they are there at every call, and their values are compared at every call on a
    CPU, at the first one of each shape on a GPU, since that waits for it. Inside torch.compile
    positions and masks of the call are not checked.

    Args:
        model: a decoder of text of transformers >= 5, such as LlamaForCausalLM; of a model of
            images and text, or of one that peft wraps, the decoder inside.
        cp: the ranks and their layout.
        config: sizes of the lighthouse layers; None for a model that is always dense.
        dense_layers: layers that stay dense, as in `lhcp.set_mode`.

    Raises:
        ImportError: transformers is not installed, or too old.
        TypeError: the model is none of transformers.
        ValueError: a layer does not attend causally, the model is attached already, or normalises
            q and k where nothing can be scored before that; or `dense_layers` or the config do not
            fit. The model is left as it was.
    """
    registries = _registries()
    modules = _attention_modules(model)
    own: Any = model
    previous = own.config._attn_implementation
    children = [HFAttention(module, cp, config) for module in modules]
    for module, child in zip(modules, children, strict=True):
        module.add_module(NAME, child)
    try:
        if config is not None:
            set_mode(model, "lighthouse", dense_layers=dense_layers)
        for registry, function in zip(registries, (attend, make_no_mask), strict=True):
            registry.register(NAME, function)
        own.set_attn_implementation(NAME)
        if own.config._attn_implementation != NAME:
            raise ValueError(
                f"model is a {type(model).__name__}, which does not call its attention through the "
                "package's AttentionInterface: call cp.attention(config) in its code"
            )
    except ValueError:
        for module in modules:
            delattr(module, NAME)
        raise
    for module, child in zip(modules, children, strict=True):
        child.watch(module)
    model.add_module(NAME, Attached(own, cp, previous))


def detach(model: nn.Module) -> None:
    """Take back what `attach` did: the model attends on one rank again, to whole sequences.

    Raises:
        ValueError: the model is not attached.
    """
    attached = getattr(model, NAME, None)
    if not isinstance(attached, Attached):
        raise ValueError(f"model is a {type(model).__name__} that is not attached")
    attached.release(model)
    for module in list(model.modules()):
        child = getattr(module, NAME, None)
        if isinstance(child, HFAttention):
            child.release()
        if isinstance(child, HFAttention | Attached):
            delattr(module, NAME)


def _attention_modules(model: nn.Module) -> list[nn.Module]:
    """Return the attention modules of a model, in order.

    Raises:
        TypeError, ValueError: as `attach`.
    """
    from transformers import PreTrainedModel

    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model is a {name}: must be a model of transformers, without DDP or another wrapper"
        )
    config = model.config
    if hasattr(model, NAME):
        raise ValueError(f"model is a {name} that is attached already: detach it first")
    if config.get_text_config() is not config:
        raise ValueError(
            f"model is a {name}, of more than text: attach the decoder inside of it, for example "
            "model.language_model"
        )
    other = set(getattr(config, "layer_types", None) or ()) - _CAUSAL_LAYERS
    if other:
        raise ValueError(
            f"model is a {name} with layers of {sorted(other)}: across ranks all must be full "
            "causal attention"
        )
    found = [m for m in model.modules() if hasattr(m, "is_causal") and hasattr(m, "layer_idx")]
    causal = sum(bool(m.is_causal) for m in found) if getattr(config, "is_causal", True) else 0
    if not len(found) == causal == config.num_hidden_layers:
        raise ValueError(
            f"model is a {name} of {config.num_hidden_layers} layers, and {len(found)} modules "
            f"attend, {causal} of them causally: must be a decoder with one in each layer"
        )
    return found


def _registries() -> tuple[Any, Any]:
    """Return the package's registries, of attention and of masks.

    Raises:
        ImportError: the package is not installed, or is too old.
    """
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        raise ImportError(f"transformers >= 5 is needed: {error}; {INSTALL}") from error
    return AttentionInterface, AttentionMaskInterface
