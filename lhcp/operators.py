"""Opaque torch operators: one node a stage and direction for torch.compile and checkpoint policies.

`torch.library.custom_op` would do the same at several times the cost a call, which shows at short
sequences; this is the plain define / impl pair that it wraps.

Records cross into an operator in two forms, packed and unpacked here alone: names as one string,
and integers as a list.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch

from lhcp.precision import without_autocast

R = TypeVar("R")

HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Whether Triton is installed; looked up once, and outside of what torch.compile traces."""

_LIBRARY = torch.library.Library("lhcp", "FRAGMENT")


def pack_words(words: Sequence[str]) -> str:
    """Return words as one argument of an operator; `unpack_words` is the way back.

    On one line: torch.compile writes arguments into comments of the code that it generates.
    """
    return "|".join(words)


def unpack_words(argument: str) -> list[str]:
    """Return the words of an argument that `pack_words` made."""
    return argument.split("|")


def pack_integers(record: Any) -> list[int]:
    """Return a flat dataclass of integers and bools as one argument of an operator."""
    return [int(getattr(record, field.name)) for field in dataclasses.fields(record)]


def unpack_integers(kind: type[R], argument: Sequence[int]) -> R:
    """Return the record of this kind that `pack_integers` packed; equal ones are one object."""
    # Of symbolic sizes, which torch.compile traces with, there is no table.
    plain = all(type(value) is int for value in argument)
    unpack: Callable[..., R] = _unpacked if plain else _unpacked.__wrapped__
    record = unpack(kind, tuple(argument))
    return record


@lru_cache(maxsize=1024)
def _unpacked(kind: Any, values: tuple[int, ...]) -> Any:
    fields = dataclasses.fields(kind)
    named = {f.name: value for f, value in zip(fields, values, strict=True)}
    flags = {f.name: bool(named[f.name]) for f in fields if f.type in (bool, "bool")}
    return kind(**(named | flags))


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
        _LIBRARY.impl(name, without_autocast(function), "CompositeExplicitAutograd")
        torch.library.register_fake(f"lhcp::{name}", fake, lib=_LIBRARY)
        overload: Callable[..., Any] = getattr(torch.ops.lhcp, name).default
        return overload

    return register
