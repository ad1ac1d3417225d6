"""Heads for sequence (DeepSpeed-Ulysses, arXiv 2309.14509): rotation "alltoall".

One exchange gives each rank the whole sequence of a part of the heads, in sequence order; one block
attends to it; one exchange brings the output back. The kv heads must divide over the ranks.
"""

from typing import Any

import torch
from torch import Tensor

from lhcp.comm.agreement import agree_on_sizes
from lhcp.comm.collectives import swap
from lhcp.comm.layout import Layout
from lhcp.comm.mesh import Ranks, pack_cut, traced, unpack_cut
from lhcp.differentiation import once_differentiable
from lhcp.operators import operator
from lhcp.timing import Spans, goes_through_operators


def tokens_to_heads(x: Tensor, ranks: Ranks, layout: Layout) -> Tensor:
    """Send [W, B, n, heads / W, D], by destination; return [B, N, heads / W, D], in sequence."""
    received = ranks.receive_buffer(x, *x.shape)
    assert ranks.flat is not None
    swap(received, x, ranks.flat)
    chunks = received.unflatten(2, (layout.chunks_per_rank, -1)).movedim(2, 1).flatten(0, 1)
    owners = [layout.owner(chunk) for chunk in range(layout.num_chunks)]
    order = [rank * layout.chunks_per_rank + slot for rank, slot in owners]
    return chunks[order].movedim(0, 1).flatten(1, 2).contiguous()


def heads_to_tokens(x: Tensor, ranks: Ranks, layout: Layout) -> Tensor:
    """Send [B, N, heads / W, D], in sequence; return [W, B, n, heads / W, D], by source."""
    chunks = x.unflatten(1, (layout.num_chunks, -1)).movedim(1, 0)
    order = [chunk for rank in range(layout.world_size) for chunk in layout.chunks(rank)]
    by_rank = chunks[order].unflatten(0, (layout.world_size, -1))
    sent = by_rank.movedim(1, 2).flatten(2, 3).contiguous()
    received = ranks.receive_buffer(sent, *sent.shape)
    assert ranks.flat is not None
    swap(received, sent, ranks.flat)
    return received


def _split(x: Tensor, world: int) -> Tensor:
    """View [B, n, heads, D] as [W, B, n, heads / W, D]."""
    return x.unflatten(2, (world, -1)).movedim(2, 0)


def _join(x: Tensor) -> Tensor:
    """Turn [W, B, n, heads / W, D] into [B, n, heads, D]."""
    return x.movedim(0, 2).flatten(2, 3)


def _fake_tokens_to_heads(x: Tensor, words: str) -> Tensor:
    world, batch, tokens, heads, head_dim = x.shape
    return x.new_empty((batch, world * tokens, heads, head_dim))


@operator("tokens_to_heads", _fake_tokens_to_heads)
def _tokens_to_heads(x: Tensor, words: str) -> Tensor:
    ranks, layout, (graph,) = unpack_cut(words)
    if graph:
        agree_on_sizes(ranks, tuple(x.shape), lambda: {"exchanged by each rank": str([*x.shape])})
    return tokens_to_heads(x, ranks, layout)


def _fake_heads_to_tokens(x: Tensor, words: str) -> Tensor:
    world = unpack_cut(words)[0].world_size
    batch, tokens, heads, head_dim = x.shape
    return x.new_empty((world, batch, tokens // world, heads, head_dim))


@operator("heads_to_tokens", _fake_heads_to_tokens)
def _heads_to_tokens(x: Tensor, words: str) -> Tensor:
    return heads_to_tokens(x, *unpack_cut(words)[:2])


Exchange = tuple[Ranks, Layout, Spans]


def _to_heads(x: Tensor, exchange: Exchange) -> Tensor:
    ranks, layout, spans = exchange
    if goes_through_operators(spans):
        out: Tensor = _tokens_to_heads(x, pack_cut(ranks, layout, traced()))
        return out
    return tokens_to_heads(x, ranks, layout)


def _to_tokens(x: Tensor, exchange: Exchange) -> Tensor:
    ranks, layout, spans = exchange
    if goes_through_operators(spans):
        out: Tensor = _heads_to_tokens(x, pack_cut(ranks, layout))
        return out
    return heads_to_tokens(x, ranks, layout)


class TokensToHeads(torch.autograd.Function):
    """q, k, v [B, n, heads, D] to [B, N, heads / W, D], packed in one message a direction."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, ranks: Ranks, layout: Layout, spans: Spans
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Exchange tokens for heads."""
        ctx.exchange = (ranks, layout, spans)
        ctx.sizes = [x.shape[2] // ranks.world_size for x in (q, k, v)]
        packed = torch.cat([_split(x, ranks.world_size) for x in (q, k, v)], 3)
        q, k, v = (x.contiguous() for x in _to_heads(packed, ctx.exchange).split(ctx.sizes, 2))
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Exchange the gradients back."""
        received = _to_tokens(torch.cat(grads, 2), ctx.exchange)
        return (*(_join(x) for x in received.split(ctx.sizes, 3)), None, None, None)


class HeadsToTokens(torch.autograd.Function):
    """Output [B, N, heads / W, D] to [B, n, heads, D]."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, ranks: Ranks, layout: Layout, spans: Spans) -> Tensor:
        """Exchange heads for tokens."""
        ctx.exchange = (ranks, layout, spans)
        return _join(_to_tokens(out, ctx.exchange))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Exchange the gradients back."""
        split = _split(grads[0], ctx.exchange[0].world_size).contiguous()
        return _to_heads(split, ctx.exchange), None, None, None
