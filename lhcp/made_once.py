"""What is made of a tensor of documents once, for all layers that are given it."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

T = TypeVar("T")

_MADE: Any = WeakIdKeyDictionary()
"""What was made of a tensor that `keep` was given, by key, for as long as it is alive."""


def keep(x: Tensor) -> Tensor:
    """Return a tensor of documents, which nobody changes, so that `made_once` keeps what it makes.

    By the tensor itself: a copy of it, such as what a CUDA graph reads, is another.
    """
    if not torch.compiler.is_compiling():
        _MADE.setdefault(x, {})
    return x


def made_once(of: Tensor, key: Hashable, make: Callable[[], T]) -> T:
    """Return what `make` makes of a tensor of documents, once for all layers that are given it.

    Args:
        key: what is made; equal ones are the same.
        make: does not hold the tensor in what it returns, which would keep it alive.
    """
    made = None if torch.compiler.is_compiling() else _MADE.get(of)
    if made is None:
        return make()
    if key not in made:
        # Kept longer than whatever mode this call is made in.
        with torch.inference_mode(False), torch.no_grad():
            made[key] = make()
    found: T = made[key]
    return found
