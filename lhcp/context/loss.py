"""The mean loss over the tokens of all ranks, and cross-entropy that never holds all its logits.

FSDP2 and DDP average gradients over their ranks. A mean over ranks of local means weighs a token by
how few its rank has; a sum divided by all tokens comes out R times too small. Right is

    loss = local sum * R / valid tokens of all R ranks        (`average`)

whose average over the R ranks is the mean over all valid tokens, whatever each of them holds.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lhcp.checks import shape_of
from lhcp.comm.mesh import Group
from lhcp.context.cross_entropy import LinearCrossEntropy, LogitsCrossEntropy

_CHUNK_LOGITS = 2**26
"""Logits that a chunk may have where the caller does not say: 256 MiB of float32."""


def average(total: Tensor, count: Tensor | float, *, over: Group) -> Tensor:
    """Return sum(total) / sum(count) over ranks, with gradients for ranks that are averaged.

    Two numbers are summed over the ranks, in float64.

    Args:
        total: scalar of this rank that carries the gradient, such as a sum of losses.
        count: what this rank adds to the denominator, such as its valid tokens.
        over: mesh (of any number of axes) or group of the ranks whose gradients are averaged, those
            of data and context parallelism together, without tensor or pipeline parallelism's;
            None for one rank.

    Returns:
        scalar of the dtype of `total`: the mean over all ranks, the same on each; 0 where nothing
        counts. Its gradient on a rank is R / sum(count) times that of `total`.
    """
    mine = torch.stack(
        [
            total.detach().double(),
            torch.as_tensor(count, dtype=torch.float64, device=total.device),
        ]
    )
    for group in _groups(over):
        dist.all_reduce(mine, group=group)
    everything, counted = mine.unbind()
    counted = counted.clamp(min=1.0)
    # The gradient is this rank's, the value everybody's: what is added is zero.
    own = total * (num_ranks(over) / counted).to(total.dtype)
    return (everything / counted).to(total.dtype) + (own - own.detach())


def cross_entropy_sum(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, chunk_tokens: int | None = None
) -> Tensor:
    """Return the sum over valid tokens of the cross-entropy of logits, in float32, by chunks.

    Beside the logits and their gradient, of their dtype, it holds one chunk of float32.

    Args:
        logits: [..., n, V]; float64 is summed in float64, all else in float32.
        labels: int64 [..., n] on the same device; those equal to `ignore_index` count nothing.
        chunk_tokens: tokens of one chunk; None: as many as have 2**26 logits.

    Raises:
        TypeError, ValueError: shapes or dtypes do not fit, or a tensor is a DTensor.
    """
    _check("logits", logits, labels)
    rows, targets = logits.flatten(0, -2), labels.flatten()
    chunk = _chunk_tokens(chunk_tokens, logits.shape[-1])
    total: Tensor = LogitsCrossEntropy.apply(rows, targets, ignore_index, chunk)
    return total


def linear_cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return `cross_entropy_sum` of hidden @ weight.T + bias without ever holding all logits.

    The gradients are made in the forward, chunk by chunk, so the logits are computed once. It holds
    the gradient of hidden, a float32 gradient of weight, and one chunk of float32 logits. (torch's
    own `F.linear_cross_entropy` is not taken: it rounds a sum of bfloat16 losses to bfloat16.)

    Args:
        hidden: [..., n, dim], what goes into the output head.
        weight: [V, dim], the head's; of the dtype of hidden, or both are cast as autocast says.
        labels: int64 [..., n]; those equal to `ignore_index` count nothing.
        bias: [V], the head's, or None.
        chunk_tokens: tokens of one chunk; None: as many as have 2**26 logits.

    Raises:
        TypeError, ValueError: as `cross_entropy_sum`.
    """
    _check("hidden", hidden, labels)
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None:
            _refuse_dtensor(name, x)
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight is {shape_of(weight)}: must be [vocabulary, {hidden.shape[-1]}], for hidden "
            f"{shape_of(hidden)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is {shape_of(bias)}: must be [{weight.shape[0]}], as weight has")
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if hidden.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        raise TypeError(
            f"hidden is {hidden.dtype}, weight {weight.dtype}: must have one dtype; cast one, or "
            "use torch.autocast"
        )
    if not torch.is_grad_enabled():
        # An evaluation makes no gradients: autograd's function cannot see that it is one.
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    rows, targets = hidden.flatten(0, -2), labels.flatten()
    chunk = _chunk_tokens(chunk_tokens, weight.shape[0])
    total: Tensor = LinearCrossEntropy.apply(rows, weight, bias, targets, ignore_index, chunk)
    return total


def shift_labels(labels: Tensor, ignore_index: int) -> Tensor:
    """Return for each token of whole sequences [B, N] the label of the next; the last has none."""
    return F.pad(labels[:, 1:], (0, 1), value=ignore_index)


def num_ranks(over: Group) -> int:
    """Return how many ranks a mesh or a group has; 1 for None."""
    return 1 if over is None else over.size()


def check_over(over: Group, sequence: dist.ProcessGroup | None) -> None:
    """Check that all ranks that share a sequence are among those that are averaged.

    Raises:
        TypeError: `over` is no mesh, group or None.
        ValueError: a rank is missing.
    """
    # A graph cannot look into a mesh; the call before compiling, or without it, has.
    if torch.compiler.is_compiling():
        return
    if over is not None and not isinstance(over, DeviceMesh | dist.ProcessGroup):
        raise TypeError(
            f"over must be a DeviceMesh, a ProcessGroup or None, got {type(over).__name__}"
        )
    if sequence is None:
        return
    found: list[int] = []
    if isinstance(over, DeviceMesh):
        found = over.mesh.flatten().tolist()
    elif over is not None:
        found = dist.get_process_group_ranks(over)
    missing = sorted(set(dist.get_process_group_ranks(sequence)) - set(found))
    if missing:
        raise ValueError(
            f"over has the ranks {found}, without {missing}, which share this sequence: pass data "
            'and context parallelism together, for example mesh["dp", "cp"], over which FSDP or '
            "DDP averages gradients"
        )


def _groups(over: Group) -> list[dist.ProcessGroup]:
    """Return groups over which a sum, one after another, is the sum over all ranks of `over`."""
    if over is None:
        return []
    if isinstance(over, DeviceMesh):
        groups = [over.get_group(axis) for axis in range(over.ndim)]
        return [group for group in groups if group.size() > 1]
    return [over] if over.size() > 1 else []


def _chunk_tokens(asked: int | None, vocabulary: int) -> int:
    if asked is None:
        return max(1, _CHUNK_LOGITS // vocabulary)
    if asked < 1:
        raise ValueError(f"chunk_tokens={asked}: must be at least 1, for example 1024, or None")
    return asked


def _check(name: str, x: Tensor, labels: Tensor) -> None:
    _refuse_dtensor(name, x)
    _refuse_dtensor("labels", labels)
    if not x.is_floating_point():
        raise TypeError(f"{name} is {shape_of(x)}: must be floating point")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels are {shape_of(labels)}: must be torch.int64")
    if x.ndim < 2 or x.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels are {shape_of(labels)}: must be {list(x.shape[:-1])}, one for each token of "
            f"{name} {shape_of(x)}: this rank's part, shifted before it was cut, as "
            'ContextParallel.shard(batch)["shift_labels"]'
        )
    if x.device != labels.device:
        raise ValueError(f"labels are {shape_of(labels)}: must be on {x.device}, as {name}")


def _refuse_dtensor(name: str, x: Tensor) -> None:
    if hasattr(x, "placements"):
        raise TypeError(
            f"{name} is a DTensor: the loss takes local tensors; under FSDP2 call it inside the "
            "forward of the module that owns the head, where its weight is whole, and under "
            "tensor parallelism with output_layouts=Replicate(), use_local_output=True"
        )
