"""Problems, cases and verdicts that the tests share: what to compute, on how many ranks, how.

A `Problem` is a whole-sequence question with one right answer (the reference's, computed once); a
`Case` is one way of asking the library. Chunks are put together by arithmetic of this file alone.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import lhcp
from lhcp import LighthouseConfig, Selection, reference
from lhcp.comm.layout import LayoutName
from lhcp.comm.mesh import as_ranks
from lhcp.config import Scorer
from lhcp.reference_documents import documents
from lhcp.ring.rotation import NAMES
from lhcp.testing.inputs import qkv, small_config
from tests.documents import cu_seqlens

ROTATIONS = NAMES
"""Every rotation of the library, those that are written later too."""

TWO_AXES = {
    "hierarchical": {2: (2, 1), 3: (3, 1), 4: (2, 2), 8: (2, 4)},
    "hybrid": {2: (2, 1), 3: (1, 3), 4: (2, 2), 8: (2, 4)},
    "hybrid_context_first": {2: (1, 2), 3: (3, 1), 4: (2, 2), 8: (4, 2)},
}
"""Rotations that need a mesh of two axes, and the shape that they get here for each world size."""

LAYOUTS: tuple[LayoutName, ...] = ("zigzag", "contiguous")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A whole sequence, a config and what to score on."""

    num_levels: int = 3
    pool_factor: int = 2
    num_strata: int = 8
    picks: int = 2
    batch: int = 1
    num_kv_heads: int = 2
    groups: int = 1
    head_dim: int = 8
    scorer: Scorer = "norm"
    scale: float | None = None
    scored: bool = False
    """score_q and score_k are given."""
    fixed: bool = False
    """The selection is given: the one that other inputs have."""
    packed: str | None = None
    """Of which documents rows are packed: of `tests.documents.KINDS`."""
    dtype: torch.dtype = torch.float64
    seed: int = 0

    @property
    def config(self) -> LighthouseConfig:
        config, _ = self._sizes
        return config

    @property
    def seqlen(self) -> int:
        _, seqlen = self._sizes
        return seqlen

    @property
    def _sizes(self) -> tuple[LighthouseConfig, int]:
        return small_config(
            num_levels=self.num_levels,
            pool_factor=self.pool_factor,
            num_strata=self.num_strata,
            picks=self.picks,
            scorer=self.scorer,
            dilation=2,
        )

    @property
    def cu_seqlens(self) -> Tensor | None:
        if self.packed is None:
            return None
        return cu_seqlens(self.packed, self.config, self.seqlen, self.batch)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the output's gradient, the same on every rank."""
        return self._draw(self.seed)

    def other_inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs of another seed: what to score on, or what a given selection was made from."""
        return self._draw(self.seed + 1000)

    def _draw(self, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return qkv(
            self.seqlen,
            batch=self.batch,
            num_heads=self.num_kv_heads * self.groups,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            seed=seed,
        )


@dataclass(frozen=True, kw_only=True)
class Case:
    """A problem, cut over ranks."""

    problem: Problem
    world_size: int = 1
    layout: LayoutName = "zigzag"
    rotation: str = "p2p"
    backend: str = "auto"

    def __str__(self) -> str:
        p = self.problem
        words = [f"W{self.world_size}"]
        if self.world_size > 1:
            words += [self.layout, self.rotation]
        words += [f"L{p.num_levels}p{p.pool_factor}C{p.num_strata}m{p.picks}"]
        words += [f"B{p.batch}G{p.groups}D{p.head_dim}", p.scorer]
        words += [word for word in ("scored", "fixed") if getattr(p, word)]
        words += [] if p.scale is None else ["scale"]
        words += [] if p.packed is None else [p.packed]
        return "-".join(words)


class Answer(NamedTuple):
    """Output, gradients and selection: of the whole sequence, or one rank's part of them."""

    o: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    levels: Tensor
    """[B, Hk, S], the level of each place."""
    indices: Tensor
    """[B, Hk, S], the index in its level of the whole sequence."""


def reference_selection(problem: Problem) -> reference.ReferenceSelection:
    """The reference's selection of a problem."""
    q, k, v, _ = problem.other_inputs() if problem.fixed else problem.inputs()
    score_q, score_k = problem.other_inputs()[:2] if problem.scored else (q, k)
    config, docs = problem.config, None
    if problem.cu_seqlens is not None:
        docs = documents(problem.cu_seqlens, problem.batch, problem.seqlen)
    scores = reference.token_scores(score_q, score_k, v, config, problem.scale, docs)
    return reference.select(*scores, config, docs)


@lru_cache(maxsize=8)
def reference_answer(problem: Problem, dtype: torch.dtype | None = None) -> Answer:
    """The reference's answer, computed in `dtype`, with the selection of its own dtype."""
    q, k, v, do = (x if dtype is None else x.to(dtype) for x in problem.inputs())
    selection = reference_selection(problem)
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    o = reference.lighthouse_attention(
        q,
        k,
        v,
        config=problem.config,
        scale=problem.scale,
        selection=selection,
        cu_seqlens=problem.cu_seqlens,
    )
    return Answer(o.detach(), *torch.autograd.grad(o, (q, k, v), do), *selection)


def chunks_of(layout: LayoutName, world_size: int, rank: int) -> tuple[int, ...]:
    """Chunks of a rank, in the order of its tokens."""
    if layout == "contiguous" or world_size == 1:
        return (rank,)
    return (rank, 2 * world_size - 1 - rank)


def part_of(x: Tensor, layout: LayoutName, world_size: int, rank: int, dim: int = 1) -> Tensor:
    """One rank's part of a whole tensor."""
    chunks = x.chunk(world_size * len(chunks_of(layout, world_size, 0)), dim)
    return torch.cat([chunks[c] for c in chunks_of(layout, world_size, rank)], dim)


def together(parts: Sequence[Tensor], layout: LayoutName, dim: int = 1) -> Tensor:
    """The whole tensor from all ranks' parts."""
    world_size = len(parts)
    placed: dict[int, Tensor] = {}
    for rank, part in enumerate(parts):
        chunks = chunks_of(layout, world_size, rank)
        placed |= dict(zip(chunks, part.chunk(len(chunks), dim), strict=True))
    return torch.cat([placed[c] for c in sorted(placed)], dim)


def decode(
    selection: Selection,
    config: LighthouseConfig,
    seqlen: int,
    layout: LayoutName,
    world_size: int,
    rank: int,
) -> tuple[Tensor, Tensor]:
    """Levels and whole-sequence indices of one rank's selection, each [B, Hk, S / W]."""
    chunks = chunks_of(layout, world_size, rank)
    num_tokens = seqlen // world_size
    offsets = [0]
    for level in range(config.num_levels):
        offsets.append(offsets[-1] + num_tokens // config.pool_factor**level)
    entries = selection.entries.cpu().long()
    levels = sum((entries >= start).long() for start in offsets[1:-1])
    assert isinstance(levels, Tensor)
    indices = entries - torch.tensor(offsets)[levels]
    per_chunk = num_tokens // len(chunks) // config.pool_factor**levels
    slot = indices // per_chunk
    return levels, torch.tensor(chunks)[slot] * per_chunk + indices % per_chunk


def num_nodes(case: "Case") -> int | None:
    """How many nodes the ranks of a case make, for rotations that need a mesh of two axes."""
    if case.rotation not in TWO_AXES or case.world_size == 1:
        return None
    return TWO_AXES[case.rotation][case.world_size][0]


def serves(rotation: str, world_size: int, num_heads: int) -> bool:
    """Whether a rotation can do these query heads on these ranks."""
    nodes, inner = TWO_AXES.get(rotation, {}).get(world_size, (1, 1))
    sharing = {"alltoall": world_size, "hybrid": inner, "hybrid_context_first": nodes}
    return num_heads % sharing.get(rotation, 1) == 0


def library_selection(group: Any, case: Case, device: str = "cpu") -> Selection:
    """This rank's selection of a case's problem, by `lhcp.select`."""
    p = case.problem

    def cut(x: Tensor) -> Tensor:
        return lhcp.shard(x.to(device), group, layout=case.layout)

    q, k, v, _ = map(cut, p.other_inputs() if p.fixed else p.inputs())
    score_q, score_k = map(cut, p.other_inputs()[:2]) if p.scored else (None, None)
    bounds = p.cu_seqlens
    return lhcp.select(
        q,
        k,
        v=v,
        config=p.config,
        group=group,
        layout=case.layout,
        score_q=score_q,
        score_k=score_k,
        scale=p.scale,
        cu_seqlens=None if bounds is None else bounds.to(device),
    )


def library_answer(group: Any, case: Case) -> Answer:
    """This rank's part of the library's answer. Runs on a rank of a pool, or here for one rank."""
    p = case.problem
    ranks = as_ranks(group)

    def cut(x: Tensor) -> Tensor:
        return lhcp.shard(x, group, layout=case.layout)

    q, k, v, do = map(cut, p.inputs())
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    selection = library_selection(group, case)
    score_q, score_k = map(cut, p.other_inputs()[:2]) if p.scored and not p.fixed else (None, None)
    o = lhcp.lighthouse_attention(
        q,
        k,
        v,
        config=p.config,
        group=group,
        layout=case.layout,
        rotation=case.rotation,
        backend=case.backend,
        scale=p.scale,
        selection=selection if p.fixed else None,
        score_q=score_q,
        score_k=score_k,
        cu_seqlens=p.cu_seqlens,
    )
    grads = torch.autograd.grad(o, (q, k, v), do)
    decoded = decode(selection, p.config, p.seqlen, case.layout, ranks.world_size, ranks.rank)
    return Answer(o.detach(), *grads, *decoded)


def whole_answer(ranks: Any, case: Case) -> Answer:
    """The library's answer, put together from all ranks; `ranks` is a RankPool."""
    if case.world_size == 1:
        return library_answer(None, case)
    parts = ranks.run(library_answer, case.world_size, case, num_nodes=num_nodes(case))
    return Answer(
        *(
            together([part[i] for part in parts], case.layout, dim=2 if i >= 4 else 1)
            for i in range(len(Answer._fields))
        )
    )


def covering(
    factors: dict[str, tuple[Any, ...]], fits: Callable[[dict[str, Any]], bool], seed: int = 0
) -> list[dict[str, Any]]:
    """A few choices that hold each pair of values of each two factors at least once.

    Greedy over random draws, the same every time for a seed. A pair with which no draw `fits`
    is left out.
    """
    names = list(factors)
    missing = [
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(factors[a], factors[b])
    ]
    generator = random.Random(seed)
    chosen = []
    while missing:
        draws = [
            {name: generator.choice(values) for name, values in factors.items()} | dict(missing[0])
            for _ in range(300)
        ]
        draws = [draw for draw in draws if fits(draw)][:60]
        left = [[pair for pair in missing if not holds(draw, pair)] for draw in draws]
        if not draws:
            missing = missing[1:]
            continue
        best = min(range(len(draws)), key=lambda i: len(left[i]))
        chosen.append(draws[best])
        missing = left[best]
    return chosen


def holds(choice: dict[str, Any], pair: tuple[tuple[str, Any], ...]) -> bool:
    return all(choice[name] == value for name, value in pair)


def ids(cases: Sequence[Case]) -> list[str]:
    return [str(case) for case in cases]


def rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    return (0, 1) if group is None else (group.rank(), group.size())


def strided(x: Tensor) -> Tensor:
    """The same values in a view of a wider buffer full of NaN, as a slice of a fused projection."""
    wide = x.new_full((*x.shape[:2], 3, *x.shape[2:]), torch.nan)
    wide[:, :, 1] = x
    return wide[:, :, 1]


def heads_first(x: Tensor) -> Tensor:
    """The same values with heads before tokens in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def dense_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float | None = None,
    docs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the whole sequence and its lse [B, H, N], in the dtype of the inputs.

    With docs [B, N], the document of each token, inside each of them.
    """
    groups = q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if causal:
        logits = logits.masked_fill(torch.ones_like(logits[0, 0]).triu(1).bool(), -torch.inf)
    if docs is not None:
        logits = logits.masked_fill((docs[:, :, None] != docs[:, None])[:, None], -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v), logits.logsumexp(-1)
