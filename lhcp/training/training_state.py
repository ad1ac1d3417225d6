"""All tensors that training changes, by name: what a checkpoint holds."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from lhcp.training.tensor_parallel import cut_rows, with_rows


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return all tensors of the training state; the optimiser's numbers come from the run.

    Their rows are in the order of an uncut model.
    """
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    found = {
        "model": get_model_state_dict(model),
        "optimizer": {name: value for name, value in state.items() if isinstance(value, Tensor)},
    }
    return reordered(found, model, whole=True) | {"rng": torch.get_rng_state()}


def reordered(state: dict[str, Any], model: nn.Module, *, whole: bool) -> dict[str, Any]:
    """Return the tensors with rows in the order of an uncut model, or back in this model's."""
    rows = cut_rows(model)
    if not rows:
        return state

    def turned(name: str, value: Tensor) -> Tensor:
        # Of the optimiser: state.<weight>.exp_avg; its step has no rows.
        of = rows.get(name, rows.get(name.removeprefix("state.").rpartition(".")[0]))
        if of is None or value.ndim == 0:
            return value
        return with_rows(value, of.argsort() if whole else of)

    return {
        kind: {name: turned(name, value) for name, value in state[kind].items()}
        for kind in ("model", "optimizer")
    }


def not_finite(state: dict[str, Any]) -> list[str]:
    """Return the names of the tensors, as `tensors_of` names them, of which a part here is not."""
    found = []
    for kind in ("model", "optimizer"):
        for name, value in state[kind].items():
            here = value.to_local() if isinstance(value, DTensor) else value
            if here.is_floating_point() and not here.isfinite().all():
                found.append(name if kind == "model" else f"{kind}.{name}")
    return found


def restore(state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put what `tensors_of` returned, with the values of a checkpoint, back."""
    own = reordered(state, model, whole=False)
    set_model_state_dict(model, own["model"])
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    whole = get_optimizer_state_dict(model, optimizer, options=options) | own["optimizer"]
    set_optimizer_state_dict(model, optimizer, whole, options=options)
    torch.set_rng_state(state["rng"])
