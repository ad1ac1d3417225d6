"""Whether ranks use NCCL here: each with a GPU of its own, or all on one that NCCL lets them share.

NCCL 2.30 and later lets them with NCCL_MULTI_RANK_GPU_ENABLE=1; they take the GPU in time slices.
"""

import os

import torch

SHARED = torch.cuda.device_count() == 1 and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"
"""Whether all ranks are on one GPU."""


def by_nccl(world: int) -> bool:
    """Whether so many ranks use NCCL; else gloo."""
    return world > 1 and (SHARED or torch.cuda.device_count() >= world)
