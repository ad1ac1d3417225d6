"""The ranks of a command: joining them, leaving them, and what all of them say."""

import os
import sys
from argparse import Namespace
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from lhcp.comm.mesh import Ranks, as_ranks
from lhcp.console import escape_unprintable
from lhcp.training.process import leave


def run_on_ranks(main: Callable[[Namespace, torch.device], None], args: Namespace) -> None:
    """Join, call main(args, device) and leave; an error ends this rank at once with status 1."""
    escape_unprintable()
    device = join(args.device)
    try:
        main(args, device)
    except BaseException as error:
        print(f"rank {os.environ.get('RANK', '0')}: {type(error).__name__}: {error}", flush=True)
        if not isinstance(error, SystemExit):
            sys.excepthook(*sys.exc_info())
        leave(1)
    leave(0)


def join(device: str) -> torch.device:
    """Join the ranks that torchrun started; a plain process is one rank.

    Not lhcp.training's join: there no device is named, and no GPU shared.

    Args:
        device: "cpu" (gloo), "cuda" (NCCL; ranks beyond the GPUs share them), or "auto": a GPU if
            there is one for each rank.
    """
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device == "auto":
        device = "cuda" if 0 < local_size <= torch.cuda.device_count() else "cpu"
    if device == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        where = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(where)
        # Without device_id: NCCL would refuse two ranks that announce one device at once.
        backend = "cpu:gloo,cuda:nccl"
    else:
        where, backend = torch.device("cpu"), "gloo"
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return where


def all_ranks(device: torch.device, nodes: int = 1, *, must_divide: bool = True) -> Ranks:
    """Return all ranks, as a mesh of two axes where there are several nodes; a collective.

    Args:
        nodes: the outer axis.
        must_divide: False: one axis where the ranks do not divide over the nodes.

    Raises:
        SystemExit: they do not divide, and must.
    """
    size = dist.get_world_size()
    if size == 1:
        return Ranks()
    if nodes < 2 or (size % nodes and not must_divide):
        return Ranks(dist.group.WORLD)
    if size % nodes:
        raise SystemExit(f"--nodes {nodes} does not divide {size} ranks")
    shape = (nodes, size // nodes)
    return as_ranks(init_device_mesh(device.type, shape, mesh_dim_names=("node", "local")))


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of --dtype: "auto" is bfloat16 on a GPU, else float32."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype
