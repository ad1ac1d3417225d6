"""Gather and reduce-scatter under one name each; torch 2.11 and 2.13 name them differently."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""all_gather(output, input, group, async_op): inputs of all ranks, one after another on axis 0."""

reduce_scatter: Callable[..., Any] = getattr(
    dist, "reduce_scatter_single", dist.reduce_scatter_tensor
)
"""reduce_scatter(output, input, group=, async_op=): this rank's run of axis 0 of the sum."""
