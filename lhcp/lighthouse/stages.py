"""The local stages under one set of names, in torch or in Triton, and as opaque operators.

`STAGES` holds two implementations of the same functions. The operators below wrap them, so that
torch.compile, CUDA graphs and selective checkpointing see one node a stage and direction, keyed by
integers and a name.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lhcp.lighthouse import gather, pool, scatter, score, select
from lhcp.lighthouse.geometry import Geometry
from lhcp.operators import operator

Pooled = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Stages:
    """One implementation of steps 1 to 4 and 6. All tensors are this rank's."""

    pool_and_score: Callable[[Tensor, Tensor, Tensor, Geometry, bool], Pooled]
    """(q, k, v, geom, with_scores) -> pooled q, k, v [B, pooled_size, heads, D] and scores
    [B, Hk, pooled_size] (empty without)."""
    score_tensors: Callable[[Tensor, Tensor, Geometry], tuple[Tensor, Tensor]]
    """(score_q, score_k, geom) -> scores [B, Hk, pooled_size]."""
    select: Callable[[Tensor, Tensor, Geometry], tuple[Tensor, Tensor]]
    """(sq, sk, geom) -> (entries [B, Hk, S], places [B, Hk, pyramid_size]), int32."""
    gather: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """(q, k, v, pooled q, pooled k, pooled v, entries, geom) -> sub-sequences of q, k, v."""
    gather_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """(dq, dk, dv of the sub-sequence, places, geom) -> dq, dk, dv of the tokens."""
    last_rows: Callable[[Tensor, Tensor, Geometry], Tensor]
    """(o, places, geom) -> what each chunk owes the next: [B, num_chunks, L-1, H, D]."""
    scatter: Callable[[Tensor, Tensor, Geometry], Tensor]
    scatter_edges: Callable[[Tensor, Tensor, Tensor, Tensor, Geometry], None]
    scatter_backward: Callable[[Tensor, Tensor, Tensor, Geometry], Tensor]
    """(dout, entries, places, geom) -> do [B, S, H, D]; one map is enough, either."""
    edge_grads: Callable[[Tensor, Geometry], Tensor]


def _torch_pool_and_score(
    q: Tensor, k: Tensor, v: Tensor, geom: Geometry, with_scores: bool
) -> Pooled:
    pooled = tuple(pool.pool(x, geom) for x in (q, k, v))
    if with_scores:
        scores = _torch_score_tensors(q, k, geom)
    else:
        scores = (q.new_empty(0, dtype=pool.accumulate_dtype(q.dtype)),) * 2
    return pooled[0], pooled[1], pooled[2], scores[0], scores[1].clone()


def _torch_score_tensors(score_q: Tensor, score_k: Tensor, geom: Geometry) -> tuple[Tensor, Tensor]:
    num_kv_heads = score_k.shape[2]
    sq, sk = (
        score.level_scores(score.token_scores(x, num_kv_heads), geom) for x in (score_q, score_k)
    )
    return sq, sk


def _torch_gather(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled_q: Tensor,
    pooled_k: Tensor,
    pooled_v: Tensor,
    entries: Tensor,
    geom: Geometry,
) -> tuple[Tensor, Tensor, Tensor]:
    qs, ks, vs = (
        gather.gather_one(x, pooled, entries)
        for x, pooled in ((q, pooled_q), (k, pooled_k), (v, pooled_v))
    )
    return qs, ks, vs


def _torch_gather_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, places: Tensor, geom: Geometry
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (gather.gather_backward_one(x, places, geom) for x in (dq, dk, dv))
    return dq, dk, dv


def _torch_scatter_backward(
    dout: Tensor, entries: Tensor, places: Tensor, geom: Geometry
) -> Tensor:
    return scatter.scatter_backward(dout, entries, geom)


TORCH = Stages(
    pool_and_score=_torch_pool_and_score,
    score_tensors=_torch_score_tensors,
    select=select.select,
    gather=_torch_gather,
    gather_backward=_torch_gather_backward,
    last_rows=scatter.last_rows,
    scatter=scatter.scatter,
    scatter_edges=scatter.scatter_edges,
    scatter_backward=_torch_scatter_backward,
    edge_grads=scatter.edge_grads,
)

KERNELS = ("torch", "triton")

# Looked up once and outside of what torch.compile traces.
HAS_TRITON = importlib.util.find_spec("triton") is not None


@cache
def stages(kernels: str) -> Stages:
    """Return the implementation called `kernels`: "torch" or "triton"."""
    if kernels == "torch":
        return TORCH
    from lhcp.lighthouse.kernels import TRITON

    return TRITON


def choose_kernels(kernels: str, dtype: torch.dtype, device: torch.device) -> str:
    """Resolve "auto" and check an explicit name: a function of device, dtype and packages alone.

    Raises:
        ValueError: no implementation has this name, or it cannot do these inputs.
        ImportError: Triton is not installed.
    """
    fits = device.type == "cuda" and dtype != torch.float64
    if kernels == "auto":
        return "triton" if fits and HAS_TRITON else "torch"
    if kernels not in KERNELS:
        raise ValueError(f"kernels={kernels!r}: must be one of auto, {', '.join(KERNELS)}")
    if kernels == "triton" and not HAS_TRITON:
        raise ImportError("kernels='triton': Triton is missing; pip install 'lhcp[triton]'")
    if kernels == "triton" and dtype == torch.float64:
        raise ValueError("kernels='triton': inputs are float64; use kernels='torch'")
    return kernels


def to_list(geom: Geometry) -> list[int]:
    """A geometry as an operator's argument."""
    return [int(value) for value in dataclasses.astuple(geom)]


def from_list(values: list[int]) -> Geometry:
    return _geometry(tuple(values))


@cache
def _geometry(values: tuple[int, ...]) -> Geometry:
    fields: dict[str, Any] = dict(
        zip((field.name for field in dataclasses.fields(Geometry)), values, strict=True)
    )
    return Geometry(**fields | {"has_first": bool(fields["has_first"])})


def _fake_pool_and_score(
    q: Tensor, k: Tensor, v: Tensor, geom: list[int], with_scores: bool, kernels: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    size = from_list(geom).pooled_size
    pooled = [x.new_empty((x.shape[0], size, *x.shape[2:])) for x in (q, k, v)]
    shape = (k.shape[0], k.shape[2], size) if with_scores else (0,)
    scores = [q.new_empty(shape, dtype=pool.accumulate_dtype(q.dtype)) for _ in range(2)]
    return pooled[0], pooled[1], pooled[2], scores[0], scores[1]


@operator("pool_and_score", _fake_pool_and_score)
def pool_and_score(
    q: Tensor, k: Tensor, v: Tensor, geom: list[int], with_scores: bool, kernels: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return stages(kernels).pool_and_score(q, k, v, from_list(geom), with_scores)


def _fake_score_tensors(
    score_q: Tensor, score_k: Tensor, geom: list[int], kernels: str
) -> tuple[Tensor, Tensor]:
    shape = (score_k.shape[0], score_k.shape[2], from_list(geom).pooled_size)
    sq, sk = (x.new_empty(shape, dtype=pool.accumulate_dtype(x.dtype)) for x in (score_q, score_k))
    return sq, sk


@operator("score_tensors", _fake_score_tensors)
def score_tensors(
    score_q: Tensor, score_k: Tensor, geom: list[int], kernels: str
) -> tuple[Tensor, Tensor]:
    return stages(kernels).score_tensors(score_q, score_k, from_list(geom))


def _fake_select(sq: Tensor, sk: Tensor, geom: list[int], kernels: str) -> tuple[Tensor, Tensor]:
    local = from_list(geom)
    entries = sq.new_empty((*sq.shape[:2], local.subsequence), dtype=torch.int32)
    return entries, sq.new_empty((*sq.shape[:2], local.pyramid_size), dtype=torch.int32)


@operator("select", _fake_select)
def select_entries(sq: Tensor, sk: Tensor, geom: list[int], kernels: str) -> tuple[Tensor, Tensor]:
    entries, places = stages(kernels).select(sq, sk, from_list(geom))
    return entries, places


def _fake_gather(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled_q: Tensor,
    pooled_k: Tensor,
    pooled_v: Tensor,
    entries: Tensor,
    geom: list[int],
    kernels: str,
) -> tuple[Tensor, Tensor, Tensor]:
    qs, ks, vs = (x.new_empty((x.shape[0], entries.shape[2], *x.shape[2:])) for x in (q, k, v))
    return qs, ks, vs


@operator("gather", _fake_gather)
def gather_subsequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled_q: Tensor,
    pooled_k: Tensor,
    pooled_v: Tensor,
    entries: Tensor,
    geom: list[int],
    kernels: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return stages(kernels).gather(q, k, v, pooled_q, pooled_k, pooled_v, entries, from_list(geom))


def _fake_gather_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, places: Tensor, geom: list[int], kernels: str
) -> tuple[Tensor, Tensor, Tensor]:
    size = from_list(geom).num_tokens
    dq, dk, dv = (x.new_empty((x.shape[0], size, *x.shape[2:])) for x in (dq, dk, dv))
    return dq, dk, dv


@operator("gather_backward", _fake_gather_backward)
def gather_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, places: Tensor, geom: list[int], kernels: str
) -> tuple[Tensor, Tensor, Tensor]:
    return stages(kernels).gather_backward(dq, dk, dv, places, from_list(geom))


class Gather(torch.autograd.Function):
    """Gather q, k and v; the gradient goes through the pooled means straight to the tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pooled_q: Tensor,
        pooled_k: Tensor,
        pooled_v: Tensor,
        entries: Tensor,
        places: Tensor,
        geom: list[int],
        kernels: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(places)
        ctx.geom, ctx.kernels = geom, kernels
        return gather_subsequence(q, k, v, pooled_q, pooled_k, pooled_v, entries, geom, kernels)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dq, dk, dv = (x.contiguous() for x in grads)
        (places,) = ctx.saved_tensors
        tokens = gather_backward(dq, dk, dv, places, ctx.geom, ctx.kernels)
        return (*tokens, *(None,) * 7)
