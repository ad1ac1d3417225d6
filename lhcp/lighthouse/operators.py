"""The local stages as opaque operators.

torch.compile, CUDA graphs and selective checkpointing see one node a stage and direction, keyed by
integers and a name.
"""

import torch
from torch import Tensor

from lhcp.lighthouse.geometry import Geometry
from lhcp.lighthouse.kernel_set import QKV
from lhcp.lighthouse.kernel_sets import kernel_set
from lhcp.operators import operator, unpack_integers
from lhcp.precision import wide


def _geometry(geom: list[int]) -> Geometry:
    return unpack_integers(Geometry, geom)


def _fake_pool_and_score(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geom: list[int],
    with_scores: bool,
    kernels: str,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    size = _geometry(geom).pooled_size
    pq, pk, pv = (x.new_empty((x.shape[0], size, *x.shape[2:])) for x in (q, k, v))
    shape = (k.shape[0], k.shape[2], size) if with_scores else (0,)
    sq, sk = (q.new_empty(shape, dtype=wide(q.dtype)) for _ in range(2))
    return pq, pk, pv, sq, sk


@operator("pool_and_score", _fake_pool_and_score)
def pool_and_score(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geom: list[int],
    with_scores: bool,
    kernels: str,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pool q, k, v into levels 1 to L-1, and score them where that is asked for."""
    pool = kernel_set(kernels).pool_and_score
    means, sq, sk = pool(QKV(q, k, v), _geometry(geom), with_scores, positions)
    return *means, sq, sk


def _fake_score_tensors(
    score_q: Tensor,
    score_k: Tensor,
    geom: list[int],
    kernels: str,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    shape = (score_k.shape[0], score_k.shape[2], _geometry(geom).pooled_size)
    sq, sk = (x.new_empty(shape, dtype=wide(x.dtype)) for x in (score_q, score_k))
    return sq, sk


@operator("score_tensors", _fake_score_tensors)
def score_tensors(
    score_q: Tensor,
    score_k: Tensor,
    geom: list[int],
    kernels: str,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Score levels 1 to L-1 by squared norms of score_q and score_k."""
    return kernel_set(kernels).score_tensors(score_q, score_k, _geometry(geom), positions)


def _fake_select(
    sq: Tensor, sk: Tensor, geom: list[int], kernels: str, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    local = _geometry(geom)
    entries, row_of_entry = (
        sq.new_empty((*sq.shape[:2], size), dtype=torch.int32)
        for size in (local.subsequence, local.pyramid_size)
    )
    return entries, row_of_entry


@operator("select", _fake_select)
def select_entries(
    sq: Tensor, sk: Tensor, geom: list[int], kernels: str, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Select entries and put them in order."""
    entries, row_of_entry = kernel_set(kernels).select(sq, sk, _geometry(geom), positions)
    return entries, row_of_entry


def _fake_gather(
    tokens: list[Tensor], means: list[Tensor], entries: Tensor, geom: list[int], kernels: str
) -> tuple[Tensor, Tensor, Tensor]:
    qs, ks, vs = (x.new_empty((x.shape[0], entries.shape[2], *x.shape[2:])) for x in tokens)
    return qs, ks, vs


@operator("gather", _fake_gather)
def gather_subsequence(
    tokens: list[Tensor], means: list[Tensor], entries: Tensor, geom: list[int], kernels: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gather the entries of q, k, v from the tokens and the means into the sub-sequence."""
    read = kernel_set(kernels).gather
    qs, ks, vs = read(QKV(*tokens), QKV(*means), entries, _geometry(geom))
    return qs, ks, vs


def _fake_gather_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    row_of_entry: Tensor,
    geom: list[int],
    kernels: str,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    size = _geometry(geom).num_tokens
    dq, dk, dv = (x.new_empty((x.shape[0], size, *x.shape[2:])) for x in (dq, dk, dv))
    return dq, dk, dv


@operator("gather_backward", _fake_gather_backward)
def gather_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    row_of_entry: Tensor,
    geom: list[int],
    kernels: str,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of the tokens from those of the sub-sequence."""
    spread = kernel_set(kernels).gather_backward
    dq, dk, dv = spread(QKV(dq, dk, dv), row_of_entry, _geometry(geom), positions)
    return dq, dk, dv
