"""The weights of a model over the ranks of a mesh: FSDP2, some layers a unit."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from lhcp.training.model import Decoder

LEAST_BYTES = 2**26
"""Of the weights of a unit, as they are gathered. A unit's hooks, gather and reduction take the
host 1 to 2 ms a step, whatever its size: for the paper's decoder (18 MB a layer) at 32K tokens on
two GPUs, longer than the GPUs take to compute the layer."""


def units(layers: Iterable[nn.Module], least: int) -> list[list[nn.Module]]:
    """Cut layers into runs of at least `least` parameters each; what is left is the last one's.

    Weights of a whole unit are gathered at once, so that no unit is larger than it must be.
    """
    runs: list[list[nn.Module]] = []
    count = least
    for layer in layers:
        if count >= least:
            runs.append([])
            count = 0
        runs[-1].append(layer)
        count += sum(p.numel() for p in layer.parameters())
    return runs


def shard_weights(model: Decoder, dtype: torch.dtype, mesh: DeviceMesh) -> FSDPModule:
    """Spread weights, gradients and optimiser state over a mesh; return the model as FSDP's.

    Gradients are summed over all of it, dp and cp alike: the loss is already divided by the tokens
    of the global batch.

    Args:
        mesh: Of one axis; where blocks are cut, one of the mesh that has the axis they are cut by.
        dtype: That weights are gathered and computed in; gradients are summed in float32.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        # The RoPE table goes into each block as fp32.
        cast_forward_inputs=False,
    )
    sharded: list[FSDPModule] = []
    for unit in units(model.blocks, LEAST_BYTES // dtype.itemsize):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
        sharded += unit[:1]  # type: ignore[arg-type]
    whole = fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in (*sharded, whole):
        # A plain sum: of a divide factor, gloo does not know PREMUL_SUM.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return whole
