"""Kernel sets: one table of names."""

from functools import cache

from lhcp.lighthouse.kernel_set import KernelSet
from lhcp.lighthouse.torch_kernels import TORCH

KERNELS = ("torch", "triton")
"""What a layer's kernels may be."""


@cache
def kernel_set(name: str) -> KernelSet:
    """Return the kernel set called "torch" or "triton"; the latter imports Triton."""
    if name == "torch":
        return TORCH
    assert name == "triton", name
    from lhcp.lighthouse.kernels import TRITON

    return TRITON
