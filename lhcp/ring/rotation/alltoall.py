"""Heads for sequence (DeepSpeed-Ulysses, arXiv 2309.14509), among all ranks or some of them.

One exchange gives each rank the tokens of all that share heads, in sequence order, of a part of the
heads; one brings the output back. `lhcp.ring.heads` says who shares them. kv heads that are on
several ranks travel to each; their gradients are summed where they came from, wide, in one order.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lhcp.comm.agreement import agree_on_sizes
from lhcp.comm.collectives import swap
from lhcp.comm.layout import Layout, make_layout
from lhcp.comm.mesh import Ranks, pack_cut, traced, unpack_cut
from lhcp.differentiation import once_differentiable
from lhcp.operators import operator
from lhcp.precision import wide
from lhcp.ring.heads import kv_copies, partners, sharing_ranks
from lhcp.ring.plan import RingPlan
from lhcp.timing import Spans, goes_through_operators


class Sharing:
    """The ranks that share heads, seen from one of them.

    Args:
        layout: of all ranks. rotation: one of `lhcp.ring.heads.SHARE_HEADS`.
    """

    def __init__(self, ranks: Ranks, layout: Layout, rotation: str) -> None:
        self._ranks = ranks
        group = ranks.inner if rotation == "hybrid" else ranks.flat
        assert group is not None
        self._group: dist.ProcessGroup = group
        place = (ranks.rank, ranks.world_size, ranks.node_size)
        self._partners = partners(rotation, *place)
        # The ranks' chunks are, among themselves, those of fewer ranks in the same layout.
        self.layout = make_layout(layout.name, sharing_ranks(rotation, *place[1:]))

    def swap(self, x: Tensor, back: bool) -> Tensor:
        """Send [ranks, ...] by destination; return as much by source."""
        to, sources = reversed(self._partners) if back else self._partners
        received = self._ranks.receive_buffer(x, *x.shape)
        swap(received, x, self._group, to, sources)
        return received


def tokens_to_heads(x: Tensor, sharing: Sharing) -> Tensor:
    """Send [P, B, n, heads / P, D], by destination; return [B, P n, heads / P, D], in sequence.

    P ranks share the heads.
    """
    layout = sharing.layout
    received = sharing.swap(x, back=False)
    chunks = received.unflatten(2, (layout.chunks_per_rank, -1)).movedim(2, 1).flatten(0, 1)
    owners = [layout.owner(chunk) for chunk in range(layout.num_chunks)]
    order = [rank * layout.chunks_per_rank + slot for rank, slot in owners]
    # Views, not an index: a list becomes a tensor on the host, which no graph may copy.
    return torch.cat([chunks[i] for i in order], 1)


def heads_to_tokens(x: Tensor, sharing: Sharing) -> Tensor:
    """Send [B, P n, heads / P, D], in sequence; return [P, B, n, heads / P, D], by source."""
    layout = sharing.layout
    chunks = x.unflatten(1, (layout.num_chunks, -1)).movedim(1, 0)
    order = [chunk for rank in range(layout.world_size) for chunk in layout.chunks(rank)]
    by_rank = torch.stack([chunks[i] for i in order]).unflatten(0, (layout.world_size, -1))
    sent = by_rank.movedim(1, 2).flatten(2, 3).contiguous()
    return sharing.swap(sent, back=True)


def _split(x: Tensor, sharing: int) -> Tensor:
    """View [B, n, heads, D] as [P, B, n, heads / P, D]."""
    return x.unflatten(2, (sharing, -1)).movedim(2, 0)


def _join(x: Tensor) -> Tensor:
    """Turn [P, B, n, heads / P, D] into [B, n, heads, D]."""
    return x.movedim(0, 2).flatten(2, 3)


def sum_copies(grad: Tensor, copies: int) -> Tensor:
    """Sum what kv heads have on several places: [B, n, heads * copies, D] to [B, n, heads, D]."""
    if copies == 1:
        return grad
    return grad.unflatten(2, (-1, copies)).sum(3, dtype=wide(grad.dtype)).to(grad.dtype)


def _sharing(words: str) -> Sharing:
    ranks, layout, (rotation,) = unpack_cut(words)
    return Sharing(ranks, layout, rotation)


def _fake_tokens_to_heads(x: Tensor, words: str) -> Tensor:
    sharing, batch, tokens, heads, head_dim = x.shape
    return x.new_empty((batch, sharing * tokens, heads, head_dim))


@operator("tokens_to_heads", _fake_tokens_to_heads)
def _tokens_to_heads(x: Tensor, words: str) -> Tensor:
    ranks, layout, (rotation, graph) = unpack_cut(words)
    if graph:
        agree_on_sizes(ranks, tuple(x.shape), lambda: {"exchanged by each rank": str([*x.shape])})
    return tokens_to_heads(x, Sharing(ranks, layout, rotation))


def _fake_heads_to_tokens(x: Tensor, words: str) -> Tensor:
    sharing = _sharing(words).layout.world_size
    batch, tokens, heads, head_dim = x.shape
    return x.new_empty((sharing, batch, tokens // sharing, heads, head_dim))


@operator("heads_to_tokens", _fake_heads_to_tokens)
def _heads_to_tokens(x: Tensor, words: str) -> Tensor:
    return heads_to_tokens(x, _sharing(words))


def _to_heads(x: Tensor, plan: RingPlan, spans: Spans) -> Tensor:
    if goes_through_operators(spans):
        words = pack_cut(plan.ranks, plan.layout, plan.rotation, traced())
        out: Tensor = _tokens_to_heads(x, words)
        return out
    return tokens_to_heads(x, Sharing(plan.ranks, plan.layout, plan.rotation))


def _to_tokens(x: Tensor, plan: RingPlan, spans: Spans) -> Tensor:
    if goes_through_operators(spans):
        out: Tensor = _heads_to_tokens(x, pack_cut(plan.ranks, plan.layout, plan.rotation))
        return out
    return heads_to_tokens(x, Sharing(plan.ranks, plan.layout, plan.rotation))


class TokensToHeads(torch.autograd.Function):
    """q, k, v [B, n, heads, D] to [B, P n, heads / P, D], packed in one message a direction."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: RingPlan, spans: Spans
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Exchange tokens for heads."""
        sharing = plan.sharing_ranks
        ctx.plan, ctx.spans = plan, spans
        ctx.copies = kv_copies(q.shape[2], k.shape[2], sharing)
        if ctx.copies > 1:
            k, v = (x.repeat_interleave(ctx.copies, 2) for x in (k, v))
        ctx.sizes = [x.shape[2] // sharing for x in (q, k, v)]
        packed = torch.cat([_split(x, sharing) for x in (q, k, v)], 3)
        q, k, v = (x.contiguous() for x in _to_heads(packed, plan, spans).split(ctx.sizes, 2))
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Exchange the gradients back."""
        received = _to_tokens(torch.cat(grads, 2), ctx.plan, ctx.spans)
        dq, dk, dv = (_join(x) for x in received.split(ctx.sizes, 3))
        return dq, sum_copies(dk, ctx.copies), sum_copies(dv, ctx.copies), None, None


class HeadsToTokens(torch.autograd.Function):
    """Output [B, P n, heads / P, D] to [B, n, heads, D]."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, plan: RingPlan, spans: Spans) -> Tensor:
        """Exchange heads for tokens."""
        ctx.plan, ctx.spans = plan, spans
        return _join(_to_tokens(out, plan, spans))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Exchange the gradients back."""
        split = _split(grads[0], ctx.plan.sharing_ranks).contiguous()
        return _to_heads(split, ctx.plan, ctx.spans), None, None
