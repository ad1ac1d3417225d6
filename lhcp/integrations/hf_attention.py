"""The attention and the mask that `hf.attach` gives a model of transformers."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lhcp.checks import shape_of
from lhcp.config import LighthouseConfig
from lhcp.context.context_parallel import ContextParallel
from lhcp.layer.module import LighthouseAttention

NAME = "lhcp"
"""Of attention and mask in the package's registries, and of the children that are added."""

QK_NORMS = ("q_norm", "q_layernorm", "query_layernorm")
"""What a module that attends calls its norm of q, where it has one; k's goes with it."""

WITHOUT_EFFECT = {
    *("position_ids", "position_embeddings", "cache_position", "logits_to_keep"),
    *("use_cache", "output_attentions", "output_hidden_states", "return_dict"),
    "output_router_logits",
    *("labels", "shift_labels", "num_items_in_batch", "max_length_q", "max_length_k"),
}
"""What models hand to their attention and it does not depend on."""

DOCUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
"""How transformers hands packed documents to its own attention."""

SHARD = "pass the batch through ContextParallel.shard: model(**cp.shard(batch))"


class HFAttention(nn.Module):
    """The attention of one module of a model, and what its queries and keys are scored on.

    Args:
        module: the one that attends, with what transformers calls `scaling` and its projections.
        cp, config: as of `attach`.

    Raises:
        ValueError: it normalises q and k and has nothing to score before that.
    """

    def __init__(self, module: nn.Module, cp: ContextParallel, config: LighthouseConfig | None):
        super().__init__()
        scale: Any = getattr(module, "scaling", None)
        self.layer: LighthouseAttention = cp.attention(config, scale=scale)
        self.kept: dict[str, Tensor] = {}
        self.handles: list[Any] = []
        norm = next((name for name in QK_NORMS if hasattr(module, name)), None)
        # A scorer that attends needs the rotary embeddings, which keep norms, in what it is given.
        self.hooked = norm is not None and config is not None and config.scorer == "norm"
        if self.hooked and not (hasattr(module, "q_proj") and hasattr(module, "k_proj")):
            raise ValueError(
                f"{type(module).__name__} normalises q and k ({norm}), so that their norms say "
                "little, and has no q_proj and k_proj, whose outputs would be scored instead: use "
                'scorer="dilated"'
            )

    def watch(self, module: Any) -> None:
        """Keep what the projections of the module return, until it attends."""
        if self.hooked:
            self.handles = [
                module.q_proj.register_forward_hook(self.keep_q),
                module.k_proj.register_forward_hook(self.keep_k),
            ]

    def release(self) -> None:
        """Stop watching."""
        for handle in self.handles:
            handle.remove()

    # Methods, not functions: a copy of the model then has hooks that keep in the copy.
    def keep_q(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        """Keep what q_proj returned."""
        self.kept["score_q"] = output.detach()

    def keep_k(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        """Keep what k_proj returned."""
        self.kept["score_k"] = output.detach()

    def forward(
        self, qkv: tuple[Tensor, Tensor, Tensor], scaling: float | None, asked: dict[str, Any]
    ) -> Tensor:
        """Attend: q [B, H, N / W, D], k and v [B, Hk, N / W, D] -> [B, N / W, H, D]."""
        q, k, v = (x.transpose(1, 2) for x in qkv)
        scores = {name: x.unflatten(-1, (-1, q.shape[-1])) for name, x in self.kept.items()}
        self.kept.clear()
        given = {name: asked.pop(name, None) for name in ("valid", "cu_seqlens")}
        check_asked(asked, q.shape[1] * self.layer.ranks.world_size)
        if scaling != self.layer.scale:
            raise ValueError(
                f"scaling={scaling}, and {self.layer.scale} when the model was attached: detach it "
                "and attach it again where you changed it; a model that passes another than its "
                "modules have, as OPT, cannot be attached"
            )
        out: Tensor = self.layer(q, k, v, **given, **scores)
        return out


def check_asked(asked: Mapping[str, Any], seqlen: int) -> None:
    """Check what a model asks of its attention beside q, k and v, N = `seqlen` tokens in all.

    Raises:
        ValueError: it cannot be done; the message says what to do.
    """
    window = asked.get("sliding_window")
    if window is not None and window < seqlen:
        raise ValueError(
            f"sliding_window={window}: shorter than the sequence of {seqlen} tokens, and attention "
            "across ranks has no windows; make the model with sliding_window=None in its config, "
            "or train on shorter sequences"
        )
    if asked.get("dropout"):
        raise ValueError(
            f"dropout={asked['dropout']}: must be 0; make the model with attention_dropout=0 in "
            "its config"
        )
    if asked.get("is_causal") is False:
        raise ValueError("is_causal=False: attention across ranks is causal")
    if any(asked.get(name) is not None for name in DOCUMENTS):
        raise ValueError(
            f"{', '.join(DOCUMENTS)}: documents of the whole batch go to the attention as "
            f"cu_seqlens, which ContextParallel.shard makes of them; {SHARD}"
        )
    known = {"sliding_window", "dropout", "is_causal", *WITHOUT_EFFECT}
    for name, x in asked.items():
        if x is not None and name not in known:
            said = shape_of(x) if isinstance(x, Tensor) else repr(x)
            raise ValueError(
                f"{name}={said} reaches the attention, which cannot do that across ranks: leave it "
                "out of the call; where the model itself passes it, it cannot be attached"
            )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **asked: Any,
) -> tuple[Tensor, None]:
    """Attend for a model: what its `AttentionInterface` calls.

    Args:
        module: the one that attends, which `attach` has given a child.
        query: [B, H, N / W, D]; key, value: [B, Hk, N / W, D], not repeated.
        attention_mask: None.
        scaling: of the logits.
        asked: what else the model and its caller pass.

    Returns:
        [B, N / W, H, D], and no weights.

    Raises:
        ValueError: something is asked for that cannot be done, or the model is not attached.
    """
    child = getattr(module, NAME, None)
    if not isinstance(child, HFAttention):
        raise ValueError(
            f"{type(module).__name__} attends by the name {NAME!r} alone: call "
            "lhcp.integrations.hf.attach(model, cp, config), which knows the ranks"
        )
    asked["attention_mask"] = attention_mask
    out: Tensor = child((query, key, value), scaling, asked)
    return out, None


def make_no_mask(
    *,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **_more: Any,
) -> None:
    """Make the causal mask of a model, which is none: what its `AttentionMaskInterface` calls.

    Of a window and of documents the attention itself is told. Positions that jump, which
    transformers reads as packed documents, are the layout's too: what they are was checked when the
    model was called.

    Raises:
        ValueError: the mask is another than causal.
    """
    if attention_mask is not None or use_vmap or q_length != kv_length:
        what = "more than causal" if use_vmap else "of padding, or of a cache,"
        raise ValueError(
            f"the model wants a mask {what} for {q_length} queries and {kv_length} keys: attention "
            f"across ranks is causal; padding goes at the end: {SHARD}"
        )
