"""All ranks of a command, told which of them are on one node."""

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from lhcp.comm.mesh import Ranks, as_ranks
from lhcp.training.process import Process


def joined(nodes: int, own: Process) -> Ranks:
    """Return all ranks, of two axes where there are several nodes; a collective.

    Raises:
        ValueError: the ranks do not divide over the nodes.
    """
    if nodes < 1 or own.world_size % nodes:
        raise ValueError(f"nodes={nodes}: must divide the {own.world_size} ranks")
    if nodes == 1:
        return Ranks(dist.group.WORLD if own.world_size > 1 else None)
    shape = (nodes, own.world_size // nodes)
    return as_ranks(init_device_mesh(own.device.type, shape, mesh_dim_names=("node", "local")))
