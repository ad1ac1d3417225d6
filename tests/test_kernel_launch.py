"""What a launch remembers: everything that Triton compiles for, and nothing that it must not."""

from typing import Any

import pytest
import torch

from lhcp.kernel_launch import MOST, Kernel, ceil_div, next_power_of_2


class Compiled:
    """As Triton's compiled kernel: indexed by a grid of three, called with all arguments."""

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.calls.append((grid, args))


class Jit:
    """As a function of `triton.jit`, which returns what it compiled."""

    arg_names = ("x", "y", "n", "BLOCK", "FLAG")

    def __init__(self, compiles: bool = True) -> None:
        self.looked: list[Any] = []
        self.launched: list[Any] = []
        self.compiles = compiles

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **constants: Any) -> Any:
            self.looked.append((grid, args, constants))
            return Compiled(self.launched) if self.compiles else None

        return run


def launch(kernel: Kernel, x: torch.Tensor, y: Any, n: int = 5, grid: Any = (3,), **more: Any):
    kernel.launch(grid, (x, y, n), **{"num_warps": 4, "BLOCK": 8, "FLAG": True} | more)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(64)


def test_the_second_launch_of_a_kind_goes_straight_to_what_was_compiled(x) -> None:
    jit = Jit()
    kernel, other = Kernel(jit), torch.randn(64)
    launch(kernel, x, (x, 7))
    launch(kernel, other, (x, 7))
    ((_, first, constants),) = jit.looked
    assert first[0] is x and constants == {"num_warps": 4, "BLOCK": 8, "FLAG": True}
    ((grid, args),) = jit.launched
    # All parameters in their order, constants too; of this call, not of the one that compiled.
    assert grid == (3, 1, 1) and args[0] is other and args[1:] == ((x, 7), 5, 8, True)


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.randn(64).bfloat16()},
        {"x": torch.randn(65)[1:]},
        {"y": (torch.randn(64), 8)},
        {"y": (torch.randn(65)[1:], 7)},
        {"n": 1},
        {"n": 16},
        {"grid": (4,)},
        {"num_warps": 8},
        {"BLOCK": 16},
        {"FLAG": False},
    ],
    ids=str,
)
def test_what_a_kernel_is_compiled_for_is_looked_at_again(x, change: dict[str, Any]) -> None:
    jit = Jit()
    kernel, usual = Kernel(jit), {"x": x, "y": (x, 7)}
    launch(kernel, **usual)
    launch(kernel, **usual | change)
    assert len(jit.looked) == 2 and not jit.launched


def test_the_interpreter_is_asked_every_time(x) -> None:
    jit = Jit(compiles=False)
    for _ in range(3):
        launch(Kernel(jit), x, 7)
    assert len(jit.looked) == 3


def test_constants_out_of_order_are_found(x) -> None:
    # They would reach a compiled kernel in the wrong places.
    with pytest.raises(AssertionError, match="order"):
        Kernel(Jit()).launch((1,), (x, x, 5), 4, FLAG=True, BLOCK=8)


def test_memory_of_many_lengths_ends(x) -> None:
    kernel = Kernel(Jit())
    for n in range(2 * MOST + 1):
        launch(kernel, x, x, n)
    assert len(kernel._compiled) <= MOST


def test_integers_are_as_triton_has_them() -> None:
    triton = pytest.importorskip("triton")
    for n in [*range(1, 70), 128, 1000, 4096]:
        assert next_power_of_2(n) == triton.next_power_of_2(n)
        assert [ceil_div(n, size) for size in range(1, 20)] == [
            triton.cdiv(n, size) for size in range(1, 20)
        ]
