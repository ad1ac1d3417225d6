"""Triton kernels of the local stages. Each launcher allocates, builds a grid and launches."""

from torch import Tensor

from lhcp.lighthouse.geometry import Geometry
from lhcp.lighthouse.kernel_set import KernelSet
from lhcp.lighthouse.kernels import gather, last_rows, pool, scatter, scatter_backward, select


def _scatter_backward(
    dout: Tensor,
    entries: Tensor,
    row_of_entry: Tensor,
    geom: Geometry,
    positions: Tensor | None = None,
) -> Tensor:
    return scatter_backward.scatter_backward(dout, row_of_entry, geom, positions)


TRITON = KernelSet(
    pool_and_score=pool.pool_and_score,
    score_tensors=pool.score_tensors,
    select=select.select,
    gather=gather.gather,
    gather_backward=gather.gather_backward,
    last_rows=last_rows.last_rows,
    scatter=scatter.scatter,
    scatter_edges=scatter.scatter_edges,
    scatter_backward=_scatter_backward,
    edge_grads=scatter_backward.edge_grads,
    add_last_grads=last_rows.add_last_grads,
)
