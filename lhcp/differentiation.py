"""Backwards that have no derivative of their own say so, in place of an answer without it."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


class _Refused(torch.autograd.Function):
    """The identity, whose backward is an error."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, *depends_on: Tensor) -> Tensor:
        """Return `x`, which is in the graph of what it depends on."""
        ctx.name = name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Refuse.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            f"lhcp does not differentiate twice: the gradients of {ctx.name} have no gradient; "
            "leave create_graph out, or attend by torch's own math where you need it"
        )


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate an autograd.Function's backward whose results must not be differentiated again.

    torch's decorator of this name lets a second derivative through where the incoming gradient has
    no graph, though the result depends on the inputs all the same.
    """

    @wraps(backward)
    def once(ctx: Any, *grads: Any) -> Any:
        # A compiled graph has no second derivative, and torch says so itself.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        of = [x for x in (*ctx.saved_tensors, *grads) if x is not None and x.requires_grad]
        if not of:
            return results
        name = backward.__qualname__.removesuffix(".backward")
        several = isinstance(results, tuple)
        found = [
            _Refused.apply(x, name, *of) if isinstance(x, Tensor) else x
            for x in (results if several else (results,))
        ]
        return tuple(found) if several else found[0]

    return once
