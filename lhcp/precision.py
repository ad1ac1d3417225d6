"""The rules of precision: sums are wider than what they sum; nobody's autocast reaches inside."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums, scores and lse are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


_DEVICES = ("cpu", "cuda")


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function compute in the dtypes that it is given, whatever torch.autocast says outside.

    Autocast is for a model's own products; ours choose their precision themselves.
    """

    @wraps(function)
    def within(*args: P.args, **kwargs: P.kwargs) -> R:
        on = [device for device in _DEVICES if torch.is_autocast_enabled(device)]
        if not on:
            return function(*args, **kwargs)
        with ExitStack() as stack:
            for device in on:
                stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return within
