"""What all ranks say, and waiting for all of them: on the host, so that a shared GPU is free."""

from typing import TypeVar

import torch
import torch.distributed as dist

from lhcp.comm.mesh import Ranks

T = TypeVar("T")


def barrier(ranks: Ranks, device: torch.device) -> None:
    """Wait until all ranks are here."""
    if ranks.world_size > 1:
        ids = [device.index] if device.type == "cuda" else None
        dist.barrier(group=ranks.flat, device_ids=ids)


def gathered(value: T, ranks: Ranks) -> list[T]:
    """Return every rank's value, by rank; a collective."""
    everybody = [value] * ranks.world_size
    if ranks.world_size > 1:
        dist.all_gather_object(everybody, value, group=ranks.flat)
    return everybody


def slowest(seconds: float, ranks: Ranks) -> float:
    """Return the largest of all ranks' seconds; a collective."""
    return max(gathered(seconds, ranks))
