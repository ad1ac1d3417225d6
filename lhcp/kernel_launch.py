"""Launches of Triton kernels whose arguments Triton looks at once, not at every call.

A launch through `triton.jit` takes the host 40 to 55 us, most of it to find out, argument by
argument, which of its compiled kernels fits: as long as a short layer's kernel runs on a GPU. What
decides is remembered here, and a kernel that was launched so before is launched at once.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

MOST = 4096
"""Kinds of launches that one kernel remembers; a program of that many lengths starts anew."""


def _kind(x: Any) -> Any:
    """Return what Triton compiles for of one argument, or something finer."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if isinstance(x, tuple):
        return tuple(map(_kind, x))
    return x


class Kernel:
    """A kernel of `triton.jit` that is launched by `launch`."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def launch(
        self, grid: tuple[int, ...], args: tuple[Any, ...], num_warps: int, **constants: Any
    ) -> None:
        """Launch on the current stream.

        Args:
            grid: programs along up to three axes.
            args: tensors of one device, the current one, integers, and tuples of either, in the
                order of the kernel's parameters.
            num_warps: of one program.
            constants: the kernel's constexpr parameters, all of them, in their order.
        """
        device = next(x for x in args if isinstance(x, Tensor)).device
        kind = (device, num_warps, grid, *map(_kind, args), *constants.values())
        known = self._compiled.get(kind)
        if known is not None:
            known(*args, *constants.values())
            return
        names = tuple(self.function.arg_names)
        assert names[len(args) :] == tuple(constants), "constants go in the order of the parameters"
        compiled = self.function[grid](*args, num_warps=num_warps, **constants)
        # The interpreter compiles nothing.
        if compiled is None:
            return
        if len(self._compiled) >= MOST:
            self._compiled.clear()
        self._compiled[kind] = compiled[(*grid, 1, 1)[:3]]


def kernel(function: Any) -> Kernel:
    """Decorate a function of `triton.jit` that the host launches."""
    return Kernel(function)


def ceil_div(length: int, size: int) -> int:
    """Return how many tiles of a size cover a length; `triton.cdiv` takes the host ten times it."""
    return -(-length // size)


def next_power_of_2(n: int) -> int:
    """Return the least power of two that is not below n >= 1."""
    return 1 << (n - 1).bit_length()
