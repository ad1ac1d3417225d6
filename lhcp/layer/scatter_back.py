"""Step 6 across ranks: scatter the outputs back, with the rows that chunks owe each other.

The rows are posted first and travel while the interior is scattered; the gradients of the rows take
the same way back. One opaque operator a direction, so that the order of messages is the program's.
"""

from typing import Any

import torch
from torch import Tensor

from lhcp.comm.layout import Layout, make_layout
from lhcp.comm.mesh import Ranks
from lhcp.layer.boundary import BoundaryExchange
from lhcp.lighthouse.scatter import add_last_grads
from lhcp.lighthouse.stages import from_list, stages
from lhcp.operators import joined, operator, parted
from lhcp.timing import UNTIMED, Spans


def scatter_back(
    o: Tensor,
    places: Tensor,
    geom_list: list[int],
    kernels: str,
    ranks: Ranks,
    layout: Layout,
    spans: Spans,
) -> Tensor:
    """Scatter [B, S / W, H, D] back to [B, N / W, H, D]."""
    geom, local = from_list(geom_list), stages(kernels)
    if ranks.world_size == 1:
        return local.scatter(o, places, geom)
    rows = local.last_rows(o, places, geom)
    exchange = BoundaryExchange(rows, ranks, layout, back=False, spans=spans)
    out = local.scatter(o, places, geom)
    local.scatter_edges(out, o, places, exchange.wait(), geom)
    return out


def scatter_back_backward(
    dout: Tensor,
    entries: Tensor,
    places: Tensor,
    geom_list: list[int],
    kernels: str,
    ranks: Ranks,
    layout: Layout,
    spans: Spans,
) -> Tensor:
    """Gradient of `scatter_back`: [B, N / W, H, D] to [B, S / W, H, D]."""
    geom, local = from_list(geom_list), stages(kernels)
    if ranks.world_size == 1:
        return local.scatter_backward(dout, entries, places, geom)
    owed = local.edge_grads(dout, geom)
    exchange = BoundaryExchange(owed, ranks, layout, back=True, spans=spans)
    do = local.scatter_backward(dout, entries, places, geom)
    add_last_grads(do, dout, exchange.wait(), places, geom)
    return do


def _fake_scatter_back(
    o: Tensor, places: Tensor, geom: list[int], kernels: str, words: str
) -> Tensor:
    return o.new_empty((o.shape[0], from_list(geom).num_tokens, *o.shape[2:]))


@operator("scatter_back", _fake_scatter_back)
def _scatter_back(o: Tensor, places: Tensor, geom: list[int], kernels: str, words: str) -> Tensor:
    return scatter_back(o, places, geom, kernels, *_from_words(words), UNTIMED)


def _fake_scatter_back_backward(
    dout: Tensor,
    entries: Tensor,
    places: Tensor,
    geom: list[int],
    kernels: str,
    words: str,
) -> Tensor:
    return dout.new_empty((dout.shape[0], entries.shape[2], *dout.shape[2:]))


@operator("scatter_back_backward", _fake_scatter_back_backward)
def _scatter_back_backward(
    dout: Tensor,
    entries: Tensor,
    places: Tensor,
    geom: list[int],
    kernels: str,
    words: str,
) -> Tensor:
    ranks, layout = _from_words(words)
    return scatter_back_backward(dout, entries, places, geom, kernels, ranks, layout, UNTIMED)


def _to_words(ranks: Ranks, layout: Layout) -> str:
    return joined([*ranks.names, layout.name])


def _from_words(words: str) -> tuple[Ranks, Layout]:
    flat, outer, inner, layout = parted(words)
    ranks = Ranks.from_names((flat, outer, inner))
    return ranks, make_layout(layout, ranks.world_size)


class ScatterBack(torch.autograd.Function):
    """Autograd of `scatter_back`."""

    @staticmethod
    def forward(
        ctx: Any,
        o: Tensor,
        entries: Tensor,
        places: Tensor,
        geom: list[int],
        kernels: str,
        ranks: Ranks,
        layout: Layout,
        spans: Spans,
    ) -> Tensor:
        ctx.save_for_backward(entries, places)
        ctx.arguments = (geom, kernels, ranks, layout, spans)
        if spans is UNTIMED or torch.compiler.is_compiling():
            return _scatter_back(o, places, geom, kernels, _to_words(ranks, layout))
        return scatter_back(o, places, *ctx.arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        entries, places = ctx.saved_tensors
        geom, kernels, ranks, layout, spans = ctx.arguments
        dout = grads[0].contiguous()
        if spans is UNTIMED or torch.compiler.is_compiling():
            words = _to_words(ranks, layout)
            do = _scatter_back_backward(dout, entries, places, geom, kernels, words)
        else:
            do = scatter_back_backward(dout, entries, places, *ctx.arguments)
        return (do, *(None,) * 7)
