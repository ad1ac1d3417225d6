"""Opaque torch operators: one node a stage and direction for torch.compile and checkpoint policies.

`torch.library.custom_op` would do the same at several times the cost a call, which shows at short
sequences; this is the plain define / impl pair that it wraps.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

_LIBRARY = torch.library.Library("lhcp", "FRAGMENT")


def joined(words: Sequence[str]) -> str:
    """Return words as one argument of an operator; `parted` is the way back.

    On one line: torch.compile writes arguments into comments of the code that it generates.
    """
    return "|".join(words)


def parted(argument: str) -> list[str]:
    """Return the words of an argument that `joined` made."""
    return argument.split("|")


def operator(
    name: str, fake: Callable[..., Any]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as torch.ops.lhcp.<name>, and return the operator.

    The function must not change its inputs nor return them or views of them, and knows nothing of
    autograd: the autograd.Functions that call it do.

    Args:
        fake: the same signature; returns empty results of the right shapes and dtypes.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"lhcp::{name}", fake, lib=_LIBRARY)
        overload: Callable[..., Any] = getattr(torch.ops.lhcp, name).default
        return overload

    return register
