"""Where tests of the whole layer run: the same tests on a CPU and, where there is one, on a GPU."""

from dataclasses import dataclass

import pytest
import torch


@dataclass(frozen=True)
class Place:
    """A device, and the dtype, kernels, backend and compiler that tests use there."""

    device: str
    dtype: torch.dtype
    kernels: str
    backend: str
    compiler: str


CPU = Place("cpu", torch.float32, "torch", "cpu", "aot_eager")
GPU = Place("cuda", torch.bfloat16, "triton", "cudnn", "inductor")
GPU_FLOAT32 = Place("cuda", torch.float32, "triton", "math", "inductor")

_needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PLACES = [
    pytest.param(CPU, id="cpu"),
    pytest.param(GPU, id="gpu", marks=_needs_gpu),
    pytest.param(GPU_FLOAT32, id="gpu-float32", marks=_needs_gpu),
]
