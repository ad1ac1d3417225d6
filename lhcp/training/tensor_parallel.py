"""Tensor parallelism: each block's heads and hidden width, cut over ranks by torch's own styles.

Embedding, norms and head are whole on each of them. A rank's part of a joined product is its part
of each of the products, so that the rows of the weight as its DTensor puts them together are in
another order than an uncut model's. In a checkpoint they are in that model's: it goes on with any
number of ranks.
"""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleOutput,
    RowwiseParallel,
    parallelize_module,
)

from lhcp.training.model import Decoder, Joined


def plan() -> dict[str, ParallelStyle]:
    """Return torch's plan of one block."""
    # What goes into several cut products is one DTensor, so that their gradients are summed over
    # the ranks once and not once each.
    norm = PrepareModuleOutput(
        output_layouts=Replicate(), desired_output_layouts=Replicate(), use_local_output=False
    )
    return {
        "attention_norm": norm,
        "attention.qk": ColwiseParallel(),
        "attention.v": ColwiseParallel(),
        "attention.out": RowwiseParallel(),
        "mlp_norm": norm,
        "mlp.gate_up": ColwiseParallel(),
        "mlp.down": RowwiseParallel(),
    }


@torch.no_grad()
def cut(model: Decoder, mesh: DeviceMesh) -> None:
    """Cut every block of a whole model over the ranks of a mesh of one axis; before FSDP2.

    Each rank's attention then has num_heads / tp of the query heads, neighbours, with their
    num_kv_heads / tp kv heads.
    """
    for module in model.modules():
        if isinstance(module, Joined):
            module.ways = mesh.size()
            module.weight.copy_(module.weight[module.whole_rows().to(module.weight.device)])
    for block in model.blocks:
        parallelize_module(block, mesh, plan())


def is_cut(tensor: Tensor) -> bool:
    """Return whether tensor parallelism has cut it, rather than FSDP2 alone."""
    return isinstance(tensor, DTensor) and tensor.device_mesh.ndim > 1


def cut_rows(model: nn.Module) -> dict[str, Tensor]:
    """Return `Joined.whole_rows` of the weights that are cut, by their names."""
    return {
        f"{name}.weight": module.whole_rows()
        for name, module in model.named_modules()
        if isinstance(module, Joined) and module.ways > 1
    }


def with_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """Return a DTensor with its rows in another order, spread as it is; every rank calls it."""
    assert isinstance(tensor, DTensor)
    whole = tensor.full_tensor()[rows.to(tensor.device)]
    return distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
