"""`set_mode`: switch the attention of a whole model between the two training stages."""

from collections.abc import Collection

from torch import nn

from lhcp.layer.module import LighthouseAttention, Mode


def set_mode(model: nn.Module, mode: Mode, *, dense_layers: Collection[int] = ()) -> int:
    """Switch every `LighthouseAttention` inside a model to `mode`; no communication.

    Layers that were made without a config are always dense and stay so. Every rank of a group must
    call it alike, between the same two steps.

    Args:
        model: any module; its layers count from 0 in the order of `model.modules()`, a shared one
            once, those without a config too.
        mode: "lighthouse" or "dense".
        dense_layers: indices of layers that are dense in both modes; negative ones count from the
            end, so that (0, 1, -2, -1) are the paper's.

    Returns:
        the number of layers that are in lighthouse mode now.

    Raises:
        ValueError: `mode` is neither, the model holds no such layer, or an index is none of its
            layers; no layer was switched.
    """
    if mode not in ("lighthouse", "dense"):
        raise ValueError(f"mode={mode!r}: must be 'lighthouse' or 'dense'")
    layers = [module for module in model.modules() if isinstance(module, LighthouseAttention)]
    if not layers:
        raise ValueError(
            f"model is a {type(model).__name__} that holds no lhcp.LighthouseAttention: make its "
            "attention with one, for example ContextParallel.attention(config)"
        )
    outside = [i for i in dense_layers if not -len(layers) <= i < len(layers)]
    if outside:
        raise ValueError(
            f"dense_layers={tuple(dense_layers)}: {outside} are not layers; this model has "
            f"{len(layers)}, 0 to {len(layers) - 1}"
        )
    dense = {i % len(layers) for i in dense_layers}
    for i, layer in enumerate(layers):
        layer.mode = "dense" if layer.config is None or i in dense else mode
    return sum(layer.mode == "lighthouse" for layer in layers)
