"""Heads for sequence (DeepSpeed-Ulysses, arXiv 2309.14509): rotation "alltoall".

One exchange gives each rank the whole sequence of a part of the heads, in sequence order; one block
attends to it; one exchange brings the output back. The kv heads must divide over the ranks.
"""

from typing import Any

import torch
from torch import Tensor

from lhcp.comm.collectives import swap
from lhcp.comm.layout import Layout, make_layout
from lhcp.comm.mesh import Ranks
from lhcp.operators import operator
from lhcp.ring.rotation import messages


def tokens_to_heads(x: Tensor, ranks: Ranks, layout: Layout) -> Tensor:
    """[W, B, n, heads / W, D] by destination to [B, N, heads / W, D] in sequence order."""
    received = messages.arriving(x, *x.shape)
    assert ranks.flat is not None
    swap(received, x, ranks.flat)
    chunks = received.unflatten(2, (layout.chunks_per_rank, -1)).movedim(2, 1).flatten(0, 1)
    owners = [layout.owner(chunk) for chunk in range(layout.num_chunks)]
    order = [rank * layout.chunks_per_rank + slot for rank, slot in owners]
    return chunks[order].movedim(0, 1).flatten(1, 2)


def heads_to_tokens(x: Tensor, ranks: Ranks, layout: Layout) -> Tensor:
    """[B, N, heads / W, D] in sequence order to [W, B, n, heads / W, D] by source."""
    chunks = x.unflatten(1, (layout.num_chunks, -1)).movedim(1, 0)
    order = [chunk for rank in range(layout.world_size) for chunk in layout.chunks(rank)]
    by_rank = chunks[order].unflatten(0, (layout.world_size, -1))
    sent = by_rank.movedim(1, 2).flatten(2, 3).contiguous()
    received = messages.arriving(sent, *sent.shape)
    assert ranks.flat is not None
    swap(received, sent, ranks.flat)
    return received


def _split(x: Tensor, world: int) -> Tensor:
    """[B, n, heads, D] to [W, B, n, heads / W, D]."""
    return x.unflatten(2, (world, -1)).movedim(2, 0)


def _join(x: Tensor) -> Tensor:
    """[W, B, n, heads / W, D] to [B, n, heads, D]."""
    return x.movedim(0, 2).flatten(2, 3)


def _fake_tokens_to_heads(x: Tensor, group: str, layout: str) -> Tensor:
    world, batch, tokens, heads, head_dim = x.shape
    return x.new_empty((batch, world * tokens, heads, head_dim))


@operator("tokens_to_heads", _fake_tokens_to_heads)
def _tokens_to_heads(x: Tensor, group: str, layout: str) -> Tensor:
    ranks = Ranks.from_names((group, "", ""))
    return tokens_to_heads(x, ranks, make_layout(layout, ranks.world_size)).contiguous()


def _fake_heads_to_tokens(x: Tensor, group: str, layout: str) -> Tensor:
    world = Ranks.from_names((group, "", "")).world_size
    batch, tokens, heads, head_dim = x.shape
    return x.new_empty((world, batch, tokens // world, heads, head_dim))


@operator("heads_to_tokens", _fake_heads_to_tokens)
def _heads_to_tokens(x: Tensor, group: str, layout: str) -> Tensor:
    ranks = Ranks.from_names((group, "", ""))
    return heads_to_tokens(x, ranks, make_layout(layout, ranks.world_size))


class TokensToHeads(torch.autograd.Function):
    """q, k, v [B, n, heads, D] to [B, N, heads / W, D], packed in one message a direction."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, ranks: Ranks, layout: Layout
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.arguments = (ranks.names[0], layout.name)
        ctx.sizes = [x.shape[2] // ranks.world_size for x in (q, k, v)]
        packed = torch.cat([_split(x, ranks.world_size) for x in (q, k, v)], 3)
        whole = _tokens_to_heads(packed, *ctx.arguments)
        q, k, v = (x.contiguous() for x in whole.split(ctx.sizes, 2))
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        received = _heads_to_tokens(torch.cat(grads, 2), *ctx.arguments)
        return (*(_join(x) for x in received.split(ctx.sizes, 3)), None, None)


class HeadsToTokens(torch.autograd.Function):
    """Output [B, N, heads / W, D] to [B, n, heads, D]."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, ranks: Ranks, layout: Layout) -> Tensor:
        ctx.arguments, ctx.world = (ranks.names[0], layout.name), ranks.world_size
        return _join(_heads_to_tokens(out, *ctx.arguments))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        split = _split(grads[0], ctx.world).contiguous()
        return _tokens_to_heads(split, *ctx.arguments), None, None
