"""Ranks of one test as spawned gloo processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _rank(rank: int, world_size: int, folder: str, fn: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    result = fn(*args)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_ranks(folder: Path, world_size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `fn(*args)` on `world_size` ranks and return what each returned (plain data, tensors).

    Args:
        folder: Empty; for the ranks' meeting point and results.
        world_size: How many.
        fn: A module-level function.
    """
    mp.spawn(_rank, (world_size, str(folder), fn, args), nprocs=world_size)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]
