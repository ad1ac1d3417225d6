"""The local stages in plain torch: any device and any float dtype."""

from torch import Tensor

from lhcp.lighthouse import gather, pool, scatter, select
from lhcp.lighthouse.geometry import Geometry
from lhcp.lighthouse.kernel_set import QKV, KernelSet, Pooled
from lhcp.lighthouse.norms import level_scores, token_scores
from lhcp.precision import wide


def _pool_and_score(
    tokens: QKV, geom: Geometry, with_scores: bool, positions: Tensor | None = None
) -> Pooled:
    means = QKV(*(pool.pool(x, geom, positions) for x in tokens))
    if with_scores:
        return Pooled(means, *_score_tensors(tokens.q, tokens.k, geom, positions))
    sq, sk = (tokens.q.new_empty(0, dtype=wide(tokens.q.dtype)) for _ in range(2))
    return Pooled(means, sq, sk)


def _score_tensors(
    score_q: Tensor, score_k: Tensor, geom: Geometry, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    of_tokens = (token_scores(x, score_k.shape[2]) for x in (score_q, score_k))
    sq, sk = (level_scores(x, geom, positions) for x in of_tokens)
    return sq, sk


def _gather(tokens: QKV, means: QKV, entries: Tensor, geom: Geometry) -> QKV:
    pairs = zip(tokens, means, strict=True)
    return QKV(*(gather.gather_one(x, pooled, entries) for x, pooled in pairs))


def _gather_backward(
    grads: QKV, row_of_entry: Tensor, geom: Geometry, positions: Tensor | None = None
) -> QKV:
    return QKV(*(gather.gather_backward_one(x, row_of_entry, geom, positions) for x in grads))


def _scatter_backward(
    dout: Tensor,
    entries: Tensor,
    row_of_entry: Tensor,
    geom: Geometry,
    positions: Tensor | None = None,
) -> Tensor:
    return scatter.scatter_backward(dout, entries, geom, positions)


TORCH = KernelSet(
    pool_and_score=_pool_and_score,
    score_tensors=_score_tensors,
    select=select.select,
    gather=_gather,
    gather_backward=_gather_backward,
    last_rows=scatter.last_rows,
    scatter=scatter.scatter,
    scatter_edges=scatter.scatter_edges,
    scatter_backward=_scatter_backward,
    edge_grads=scatter.edge_grads,
    add_last_grads=scatter.add_last_grads,
)
