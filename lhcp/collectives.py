"""Collectives under one name each, whatever torch and its backends call and refuse."""

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""all_gather(output, input, group, async_op): inputs of all ranks, one after another on axis 0."""

reduce_scatter: Callable[..., Any] = getattr(
    dist, "reduce_scatter_single", dist.reduce_scatter_tensor
)
"""reduce_scatter(output, input, group=, async_op=): this rank's run of axis 0 of the sum."""


def all_to_all(
    output: Tensor,
    input: Tensor,
    output_rows: Sequence[int],
    input_rows: Sequence[int],
    group: dist.ProcessGroup,
) -> dist.Work | None:
    """Start an all-to-all of rows of axis 0; either side may be empty.

    Args:
        output_rows, input_rows: rows from and for each rank.

    Returns:
        what to wait for; None where nothing is under way.
    """
    # The backend that sends nothing refuses to get rows for none.
    if input.shape[0] == 0 and dist.get_backend(group) == "fake":
        return None
    work: dist.Work | None = dist.all_to_all_single(
        output,
        input,
        output_split_sizes=list(output_rows),
        input_split_sizes=list(input_rows),
        group=group,
        async_op=True,
    )
    return work
