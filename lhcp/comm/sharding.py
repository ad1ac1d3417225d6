"""Whole tensors to this rank's part and back: `shard`, `unshard`, `positions`, padding."""

from typing import Any

import torch
from torch import Tensor

from lhcp.checks import check_plain, shape_of
from lhcp.comm.agreement import agreed
from lhcp.comm.collectives import all_gather, reduce_scatter
from lhcp.comm.layout import Layout, LayoutName, make_layout
from lhcp.comm.mesh import Group, Ranks, as_ranks
from lhcp.differentiation import once_differentiable
from lhcp.documents import Cut
from lhcp.packing import read_packing


def positions(
    seqlen: int,
    group: Group | Ranks = None,
    layout: LayoutName = "zigzag",
    device: torch.device | str | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Return the global positions of this rank's tokens, for RoPE and for losses.

    Args:
        seqlen: N, tokens of the whole sequence.
        group: the context-parallel ranks (ProcessGroup, DeviceMesh or None for one rank).
        layout: "zigzag" or "contiguous".
        cu_seqlens: documents of the whole batch, as in `lhcp.lighthouse_attention`: positions then
            begin at 0 in each of them.

    Returns:
        int64 tensor of shape [N / W], or [B, N / W] with documents, in the order in which this rank
        holds the tokens.

    Raises:
        TypeError, ValueError: the layout does not divide `seqlen`, or documents do not fit.
    """
    ranks = as_ranks(group)
    cut = make_layout(layout, ranks.world_size)
    cut.check_seqlen(seqlen)
    if cu_seqlens is not None:
        check_plain("cu_seqlens", cu_seqlens)
        batch = max(int(cu_seqlens.flatten()[-1]) // seqlen, 1) if cu_seqlens.numel() else 1
        held = Cut(batch, seqlen, cut.num_chunks, cut.chunks(ranks.rank))
        packing = read_packing(cu_seqlens, batch, seqlen)
        where = torch.empty(0, device=device).device
        return packing.local(held, where).positions.long()
    size = seqlen // cut.num_chunks
    return torch.cat(
        [torch.arange(c * size, (c + 1) * size, device=device) for c in cut.chunks(ranks.rank)]
    )


def shard(
    x: Tensor, group: Group | Ranks = None, dim: int = 1, layout: LayoutName = "zigzag"
) -> Tensor:
    """Take this rank's part of a whole tensor; no communication.

    The backward is the true adjoint for an objective summed over ranks: this rank's gradient at its
    own positions, zero elsewhere. Sum over ranks (as FSDP does with a divide factor of 1) to have
    the whole gradient of a tensor that every rank holds.

    Args:
        x: whole tensor, with N tokens along `dim`, the same on every rank.
        group: the context-parallel ranks.
        dim: the axis of the tokens.
        layout: "zigzag" or "contiguous".

    Returns:
        contiguous tensor with N / W tokens along `dim`.

    Raises:
        ValueError: the layout does not divide the axis, or `x` has no such axis.
    """
    _check_axis(x, dim)
    index = positions(x.shape[dim], group, layout, device=x.device)
    return x.index_select(dim, index)


def unshard(
    x: Tensor, group: Group | Ranks = None, dim: int = 1, layout: LayoutName = "zigzag"
) -> Tensor:
    """Gather the whole tensor on every rank from each rank's part: the mirror of `shard`.

    The backward is the true adjoint for an objective summed over ranks: the gradients of all ranks'
    copies are summed and each rank gets its own part (a reduce-scatter).

    Args:
        x: this rank's part, N / W tokens along `dim` in layout order, the same shape on every rank;
            of any dtype.
        group: the context-parallel ranks.
        dim: the axis of the tokens.
        layout: "zigzag" or "contiguous".

    Returns:
        tensor with N tokens along `dim`, the same on every rank.

    Raises:
        ValueError: `x` has no such axis.
    """
    ranks = as_ranks(group)

    def prepare() -> Layout:
        _check_axis(x, dim)
        return make_layout(layout, ranks.world_size)

    if torch.compiler.is_compiling():
        cut = prepare()
    else:
        sizes = (getattr(x, "shape", None), getattr(x, "dtype", None))
        asked = {"unshard": str(sizes), "dim": str(dim), "layout": str(layout)}
        cut = agreed(ranks, ("unshard", *sizes, dim, layout), prepare, lambda _: asked)
    if ranks.world_size == 1:
        return x.clone()
    return _Unshard.apply(x, ranks, dim, cut)


def pad_to_multiple(x: Tensor, multiple: int, dim: int = 1, value: float = 0) -> Tensor:
    """Pad a whole tensor at its end, so that the length along `dim` is a multiple of `multiple`.

    As `pad_to_length`, which is for a config's lengths: those have a least one too.

    Args:
        x: whole tensor.
        multiple: tokens, for example `LighthouseConfig.seqlen_multiple`.
        dim: the axis of the tokens.
        value: what the new places hold.

    Raises:
        ValueError: `multiple` is less than 1, or `x` has no such axis.
    """
    _check_axis(x, dim)
    if multiple < 1:
        raise ValueError(
            f"multiple={multiple}: must be at least 1, for example LighthouseConfig.seqlen_multiple"
        )
    return pad_to_length(x, x.shape[dim] + -x.shape[dim] % multiple, dim, value)


def pad_to_length(x: Tensor, length: int, dim: int = 1, value: float = 0) -> Tensor:
    """Pad a whole tensor at its end to `length` tokens along `dim`, such as a config's length.

    `LighthouseConfig.padded_length` and `ContextParallel.padded_length` know what fits. Causal
    attention never lets an earlier token see the padding; so that selection does not either, give
    the layer `valid`.

    Args:
        x: whole tensor.
        length: tokens along `dim` afterwards.
        dim: the axis of the tokens.
        value: what the new places hold.

    Raises:
        ValueError: `x` is longer already, or has no such axis.
    """
    _check_axis(x, dim)
    missing = length - x.shape[dim]
    if missing < 0:
        raise ValueError(f"length={length}: must be at least the {x.shape[dim]} tokens of x")
    if not missing:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x, x.new_full(shape, value)], dim)


def _check_axis(x: Tensor, dim: int) -> None:
    check_plain("x", x)
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(
            f"dim={dim}: a tensor of shape {shape_of(x)} has no such axis; pass the axis of the "
            "tokens, for example dim=0"
        )


def _by_rank(world: Tensor, layout: Layout) -> Tensor:
    """Put sequence order into rank order along axis 0."""
    chunks = world.unflatten(0, (layout.num_chunks, -1))
    order = [c for rank in range(layout.world_size) for c in layout.chunks(rank)]
    return chunks[order].flatten(0, 1)


def _by_position(world: Tensor, layout: Layout) -> Tensor:
    """Put rank order into sequence order along axis 0: the inverse of `_by_rank`."""
    chunks = world.unflatten(0, (layout.num_chunks, -1))
    owners = [layout.owner(c) for c in range(layout.num_chunks)]
    order = [rank * layout.chunks_per_rank + slot for rank, slot in owners]
    return chunks[order].flatten(0, 1)


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, dim: int, layout: Layout) -> Tensor:
        ctx.ranks, ctx.dim, ctx.layout = ranks, dim, layout
        part = x.movedim(dim, 0).contiguous()
        world = part.new_empty((part.shape[0] * ranks.world_size, *part.shape[1:]))
        # As bytes: gloo has no int16 and no float8. Flat: an axis of one may have any stride.
        flat = [x.flatten().view(torch.uint8) for x in (world, part)]
        all_gather(*flat, group=ranks.flat)
        return _by_position(world, layout).movedim(0, dim).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        world = _by_rank(grads[0].movedim(ctx.dim, 0), ctx.layout).contiguous()
        part = world.new_empty((world.shape[0] // ctx.ranks.world_size, *world.shape[1:]))
        reduce_scatter(part, world, group=ctx.ranks.flat)
        return part.movedim(0, ctx.dim), None, None, None
