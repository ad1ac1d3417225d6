"""Step 6 across ranks: scatter the outputs back, with the rows that chunks owe each other.

The rows are posted first and travel while the interior is scattered; the gradients of the rows take
the same way back. One opaque operator a direction, so that the order of messages is the program's.
With documents the same rows travel, and whoever they come to judges which of its tokens they serve.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lhcp.comm.layout import Layout
from lhcp.comm.mesh import Ranks, pack_cut, unpack_cut
from lhcp.differentiation import once_differentiable
from lhcp.layer.boundary import BoundaryExchange
from lhcp.lighthouse.geometry import Geometry
from lhcp.lighthouse.kernel_set import KernelSet
from lhcp.lighthouse.kernel_sets import kernel_set
from lhcp.operators import operator, unpack_integers
from lhcp.precision import without_autocast
from lhcp.timing import UNTIMED, Spans, goes_through_operators


@dataclass(frozen=True)
class ScatterPlan:
    """How a scatter is carried out."""

    integers: list[int]
    """The packed geometry."""
    kernels: str
    """One of `lhcp.lighthouse.kernel_sets.KERNELS`."""
    ranks: Ranks
    layout: Layout

    @property
    def geometry(self) -> Geometry:
        """The sizes of this rank's tokens."""
        return unpack_integers(Geometry, self.integers)

    @property
    def local(self) -> KernelSet:
        """The kernels of this rank's part."""
        return kernel_set(self.kernels)

    def pack(self) -> tuple[list[int], str]:
        """Return the plan as arguments of an operator; `unpack` is the way back."""
        return self.integers, pack_cut(self.ranks, self.layout, self.kernels)

    @classmethod
    def unpack(cls, integers: list[int], words: str) -> "ScatterPlan":
        """Return the plan that was packed."""
        ranks, layout, (kernels,) = unpack_cut(words)
        return cls(integers, kernels, ranks, layout)


@without_autocast
def scatter_back(
    o: Tensor,
    row_of_entry: Tensor,
    plan: ScatterPlan,
    spans: Spans,
    positions: Tensor | None = None,
) -> Tensor:
    """Scatter [B, S / W, H, D] back to [B, N / W, H, D]; `positions`: inside documents."""
    geom, local = plan.geometry, plan.local
    if plan.ranks.world_size == 1:
        return local.scatter(o, row_of_entry, geom, positions)
    rows = local.last_rows(o, row_of_entry, geom)
    exchange = BoundaryExchange(rows, plan.ranks, plan.layout, back=False, spans=spans)
    out = local.scatter(o, row_of_entry, geom, positions)
    local.scatter_edges(out, o, row_of_entry, exchange.wait(), geom, positions)
    return out


@without_autocast
def scatter_back_backward(
    dout: Tensor,
    entries: Tensor,
    row_of_entry: Tensor,
    plan: ScatterPlan,
    spans: Spans,
    positions: Tensor | None = None,
) -> Tensor:
    """Compute the gradient of `scatter_back`: [B, N / W, H, D] to [B, S / W, H, D]."""
    geom, local = plan.geometry, plan.local
    if plan.ranks.world_size == 1:
        return local.scatter_backward(dout, entries, row_of_entry, geom, positions)
    owed = local.edge_grads(dout, geom, positions)
    exchange = BoundaryExchange(owed, plan.ranks, plan.layout, back=True, spans=spans)
    do = local.scatter_backward(dout, entries, row_of_entry, geom, positions)
    local.add_last_grads(do, dout, exchange.wait(), row_of_entry, geom)
    return do


def _fake_scatter_back(
    o: Tensor, row_of_entry: Tensor, geom: list[int], words: str, positions: Tensor | None = None
) -> Tensor:
    num_tokens = unpack_integers(Geometry, geom).num_tokens
    return o.new_empty((o.shape[0], num_tokens, *o.shape[2:]))


@operator("scatter_back", _fake_scatter_back)
def _scatter_back(
    o: Tensor, row_of_entry: Tensor, geom: list[int], words: str, positions: Tensor | None = None
) -> Tensor:
    return scatter_back(o, row_of_entry, ScatterPlan.unpack(geom, words), UNTIMED, positions)


def _fake_scatter_back_backward(
    dout: Tensor,
    entries: Tensor,
    row_of_entry: Tensor,
    geom: list[int],
    words: str,
    positions: Tensor | None = None,
) -> Tensor:
    return dout.new_empty((dout.shape[0], entries.shape[2], *dout.shape[2:]))


@operator("scatter_back_backward", _fake_scatter_back_backward)
def _scatter_back_backward(
    dout: Tensor,
    entries: Tensor,
    row_of_entry: Tensor,
    geom: list[int],
    words: str,
    positions: Tensor | None = None,
) -> Tensor:
    plan = ScatterPlan.unpack(geom, words)
    return scatter_back_backward(dout, entries, row_of_entry, plan, UNTIMED, positions)


class ScatterBack(torch.autograd.Function):
    """Autograd of `scatter_back`."""

    @staticmethod
    def forward(
        ctx: Any,
        o: Tensor,
        entries: Tensor,
        row_of_entry: Tensor,
        plan: ScatterPlan,
        spans: Spans,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Scatter the outputs back."""
        ctx.save_for_backward(entries, row_of_entry, positions)
        ctx.plan, ctx.spans = plan, spans
        if goes_through_operators(spans):
            out: Tensor = _scatter_back(o, row_of_entry, *plan.pack(), positions)
            return out
        return scatter_back(o, row_of_entry, plan, spans, positions)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Sum, for each entry, the gradients of its positions."""
        (entries, rows, positions), dout = ctx.saved_tensors, grads[0].contiguous()
        if goes_through_operators(ctx.spans):
            do = _scatter_back_backward(dout, entries, rows, *ctx.plan.pack(), positions)
        else:
            do = scatter_back_backward(dout, entries, rows, ctx.plan, ctx.spans, positions)
        return do, *(None,) * 5
