"""One rank of a world that is not there: its schedule without anybody else's process."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from lhcp.comm.mesh import Ranks, as_ranks
from lhcp.comm.torch_private import init_fake_world


@contextmanager
def world_without_messages(rank: int, world_size: int, nodes: int = 1) -> Iterator[Ranks]:
    """Be one rank of a world whose messages complete at once and send nothing.

    It is the default group meanwhile, so there must be none before.

    Args:
        nodes: more than one: a mesh of two axes, as many nodes of equal size.
    """
    init_fake_world(rank, world_size)
    try:
        if nodes == 1:
            yield Ranks(dist.group.WORLD)
        else:
            shape = (nodes, world_size // nodes)
            yield as_ranks(init_device_mesh("cpu", shape, mesh_dim_names=("node", "local")))
    finally:
        dist.destroy_process_group()
