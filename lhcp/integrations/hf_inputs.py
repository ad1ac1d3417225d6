"""What a model of transformers is called with, once `hf.attach` has changed its attention."""

from collections.abc import Hashable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from lhcp.checks import shape_of
from lhcp.comm.agreement import agreed
from lhcp.context.context_parallel import ContextParallel
from lhcp.integrations.hf_attention import SHARD
from lhcp.integrations.hf_rope import check_frequencies
from lhcp.integrations.positions import first_wrong


class Attached(nn.Module):
    """What a model was before `attach`, and the check of what it is called with.

    Args:
        model: the model.
        cp: as of `attach`.
        previous: name of its own attention.
    """

    def __init__(self, model: Any, cp: ContextParallel, previous: str) -> None:
        super().__init__()
        self.cp, self.previous, self.use_cache = cp, previous, model.config.use_cache
        self.config = model.config
        # A cache would hold all keys of a training step once more.
        model.config.use_cache = False
        self.names = tuple(signature(model.base_model.forward).parameters)
        self.compared: set[Hashable] = set()
        self.token = object()
        self.handles = [
            model.base_model.register_forward_pre_hook(self.check, with_kwargs=True),
            model.register_forward_pre_hook(check_no_labels, with_kwargs=True),
        ]

    def release(self, model: Any) -> None:
        """Make the model what it was."""
        for handle in self.handles:
            handle.remove()
        model.config.use_cache = self.use_cache
        model.set_attn_implementation(self.previous)

    def check(self, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Check what the model is called with, as `attach` says.

        Raises:
            ValueError: on every rank where shapes are new, else on the one that it concerns.
        """
        if torch.compiler.is_compiling():
            return
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        positions, cu_seqlens = given.get("position_ids"), given.get("cu_seqlens")
        shapes = {
            name: str(list(x.shape)) if isinstance(x, Tensor) else repr(x)
            for name, x in (("tokens", tokens), ("position_ids", positions))
        }
        # Their number is another in each step; the layers compare which they are.
        shapes["cu_seqlens"] = "none" if cu_seqlens is None else "given"
        key = (self.token, *shapes.values())

        def prepare() -> None:
            check_no_mask(given)
            if isinstance(tokens, Tensor):
                ids = checked_positions(positions, tokens.shape[:2])
                check_frequencies(self.config, tokens.shape[1] * self.cp.world_size, self.cp)
                if key not in self.compared or ids.device.type == "cpu":
                    compare_positions(ids, self.cp, cu_seqlens)

        agreed(self.cp.ranks, key, prepare, lambda _: {"call": "model", **shapes})
        self.compared.add(key)


def check_no_labels(
    _module: nn.Module, _inputs: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Check that a model is not to make its own loss.

    Raises:
        ValueError: it is; its labels would be shifted inside of this rank's part.
    """
    if kwargs.get("labels") is not None:
        raise ValueError(
            "labels are given: the model would shift them once more, and inside of each rank's "
            'part; use cp.loss(model(**batch).logits, batch["shift_labels"], over=mesh), with the '
            "batch that ContextParallel.shard returns"
        )


def check_no_mask(given: Mapping[str, Any]) -> None:
    """Check that a model is called without a mask and without a cache.

    Raises:
        ValueError: it is not.
    """
    mask = given.get("attention_mask")
    if mask is not None:
        what = shape_of(mask) if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ValueError(
            f"attention_mask is {what}: attention across ranks is causal and takes none; of padding"
            f" at the end `valid` is made: {SHARD}"
        )
    for name in ("cache", "past_key_values", "use_cache"):
        if given.get(name):
            raise ValueError(
                f"{name} is given: decoding runs on one rank, with whole sequences; call "
                "lhcp.integrations.hf.detach(model) before generate"
            )


def checked_positions(positions: Any, tokens: Sequence[int]) -> Tensor:
    """Return position_ids, which have the shape of this rank's tokens [B, N / W].

    Raises:
        ValueError: they have not.
    """
    rows, num_tokens = tokens
    if not isinstance(positions, Tensor):
        raise ValueError(
            f"position_ids are {positions}: each rank would count from 0, and nothing would show "
            f"it; {SHARD}"
        )
    if tuple(positions.shape) not in ((1, num_tokens), (rows, num_tokens)):
        raise ValueError(
            f"position_ids are {shape_of(positions)}: must be [1, {num_tokens}], or one row a "
            f"sequence, [{rows}, {num_tokens}]; {SHARD}"
        )
    return positions


def compare_positions(positions: Tensor, cp: ContextParallel, cu_seqlens: Tensor | None) -> None:
    """Check that position_ids are those of this rank's tokens, in the sequence or in documents.

    Raises:
        ValueError: they are not.
    """
    wrong = first_wrong(positions, cp)
    if wrong is None or (cu_seqlens is not None and first_wrong(positions, cp, cu_seqlens) is None):
        return
    raise ValueError(
        f"position_ids: {wrong}; {SHARD}. Documents that are packed into one sequence need their "
        "bounds: give the batch cu_seq_lens_q, or cu_seqlens=lhcp.cu_seqlens_from_position_ids("
        "position_ids), before it is cut"
    )
