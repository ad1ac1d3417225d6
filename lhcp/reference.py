"""The oracle: the whole method on the whole sequence, in plain differentiable torch.

It reads like the method's description (lhcp/METHOD.md), shares no code with the library but the
config, and is slow and memory-hungry on purpose: loops over strata, explicit sorts, a full S x S
mask. Nothing in the library imports it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lhcp.config import LighthouseConfig
from lhcp.reference_documents import (
    check_documents,
    documents,
    first_tokens,
    in_last_document,
)


class ReferenceSelection(NamedTuple):
    """For each batch row and kv head, the entries of the sub-sequence in order."""

    levels: Tensor
    """[B, Hk, S] int64, the level of each place."""
    indices: Tensor
    """[B, Hk, S] int64, the entry's index inside its level."""


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def pool(x: Tensor, config: LighthouseConfig, docs: Tensor | None = None) -> list[Tensor]:
    """Means of x [B, N, H, D] over the windows of each level, summed wide, rounded once.

    With documents [B, N], over those tokens of a window that are in its last token's document.
    """
    wide = x.to(accumulate_dtype(x.dtype))
    levels = [x]
    for level in range(1, config.num_levels):
        windows = wide.unflatten(1, (-1, config.pool_factor**level))
        if docs is None:
            mean = windows.mean(2)
        else:
            own = in_last_document(docs, config.pool_factor**level)[..., None, None]
            mean = windows.where(own, 0).sum(2) / own.sum(2)
        levels.append(mean.to(x.dtype))
    return levels


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, docs: Tensor | None = None
) -> Tensor:
    """Plain causal softmax attention: q [B, S, H, D], k and v [B, S, Hk, D] -> [B, S, H, D].

    With documents [B, H, S], inside each of them alone.
    """
    groups = q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    if docs is not None:
        future = future | (docs[..., :, None] != docs[..., None, :])
    weights = logits.masked_fill(future, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def token_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: LighthouseConfig,
    scale: float | None = None,
    docs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores of level 0, (sq, sk), each [B, Hk, N]."""
    groups = q.shape[2] // k.shape[2]
    if config.scorer == "dilated":
        q, k = dilated_outputs(q, k, v, config, scale, docs)
    elif config.scorer != "norm":
        raise ValueError(f"scorer={config.scorer!r}: the oracle knows norm and dilated")
    sq, sk = ((x.to(accumulate_dtype(x.dtype)) ** 2).sum(-1) for x in (q, k))
    if sq.shape[2] != v.shape[2]:
        sq = sq.unflatten(2, (-1, groups)).amax(3)
    if sk.shape[2] != v.shape[2]:
        sk = sk.unflatten(2, (-1, groups)).amax(3)
    worst = torch.tensor(torch.inf, dtype=sq.dtype, device=sq.device)
    return (
        torch.where(sq.isnan(), worst, sq).transpose(1, 2),
        torch.where(sk.isnan(), worst, sk).transpose(1, 2),
    )


def dilated_outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: LighthouseConfig,
    scale: float | None = None,
    docs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs of the dilated scorer's two attentions, each [B, N, H, D], inside documents."""
    groups = q.shape[2] // k.shape[2]
    scale = v.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    seqlen = q.shape[1]
    window = min(config.scorer_window, seqlen // config.num_strata)
    as_query = torch.zeros_like(q[..., :1]).repeat(1, 1, 1, v.shape[-1])
    as_key = torch.zeros_like(as_query)
    for start in range(0, seqlen, window):
        for residue in range(config.dilation):
            rows = slice(start + residue, start + window, config.dilation)
            of = None if docs is None else docs[:, None, rows]
            as_query[:, rows] = causal_attention(q[:, rows], k[:, rows], v[:, rows], scale, of)
            as_key[:, rows] = causal_attention(k[:, rows], q[:, rows], v[:, rows], scale, of)
    return as_query, as_key


def level_scores(scores: Tensor, docs: Tensor, window: int) -> list[float]:
    """Largest score of each window of a row [N], of tokens in its last one's document [1, N]."""
    own = in_last_document(docs, window)[0]
    return scores.unflatten(0, (-1, window)).masked_fill(~own, -torch.inf).amax(1).tolist()


def select(
    sq: Tensor, sk: Tensor, config: LighthouseConfig, docs: Tensor | None = None
) -> ReferenceSelection:
    """Pick entries stratum by stratum from level-0 scores [B, Hk, N]; return them in order."""
    p, top = config.pool_factor, config.num_levels - 1
    batch, heads, seqlen = sq.shape
    if docs is None:
        docs = documents(torch.arange(batch + 1) * seqlen, batch, seqlen)
    docs = docs.to(sq.device)
    check_documents(docs, config)
    size = seqlen // config.num_strata
    levels, indices = [], []
    for b in range(batch):
        starts = first_tokens(docs, b)
        for h in range(heads):
            entries: list[tuple[int, int, int]] = []
            for stratum in range(config.num_strata):
                candidates = list(range(stratum * size // p**top, (stratum + 1) * size // p**top))
                for level in range(top, 0, -1):
                    entries += [last_token_first(level, i, p) for i in candidates]
                    level_q = level_scores(sq[b, h], docs[b : b + 1], p**level)
                    level_k = level_scores(sk[b, h], docs[b : b + 1], p**level)
                    forced = {t // p**level for t in starts} & set(candidates)
                    taken = take(candidates, level_q, level_k, config.picks, sorted(forced))
                    candidates = [i * p + child for i in taken for child in range(p)]
                entries += [last_token_first(0, i, p) for i in candidates]
            entries.sort()
            levels.append([level for _, level, _ in entries])
            indices.append([index for _, _, index in entries])
    shape = (batch, heads, -1)
    return ReferenceSelection(
        torch.tensor(levels, device=sq.device).view(shape),
        torch.tensor(indices, device=sq.device).view(shape),
    )


def last_token_first(level: int, index: int, p: int) -> tuple[int, int, int]:
    """Sort key of an entry: the last token that it covers, then its level (post-order)."""
    return ((index + 1) * p**level - 1, level, index)


def take(
    candidates: list[int], sq: list[float], sk: list[float], picks: int, forced: list[int]
) -> list[int]:
    """Half of the picks by query score, half by key score; ties to the lower index.

    `forced` come before all scores: first in the places of the query half, then of the key half.
    """
    half = picks // 2
    by_query, by_key = forced[:half], forced[half:]
    rest = sorted((i for i in candidates if i not in forced), key=lambda i: (-sq[i], i))
    by_query = by_query + rest[: half - len(by_query)]
    chosen = {*by_query, *by_key}
    rest = sorted((i for i in candidates if i not in chosen), key=lambda i: (-sk[i], i))
    return sorted(by_query + by_key + rest[: half - len(by_key)])


def gather(
    x: Tensor,
    selection: ReferenceSelection,
    config: LighthouseConfig,
    docs: Tensor | None = None,
) -> Tensor:
    """Gather x's pyramid into the sub-sequence: [B, N, H, D] -> [B, S, H, D]."""
    pyramid = pool(x, config, docs)
    offsets = torch.tensor([0] + [level.shape[1] for level in pyramid[:-1]]).cumsum(0)
    places = offsets.to(x.device)[selection.levels] + selection.indices
    groups = x.shape[2] // places.shape[1]
    places = places.repeat_interleave(groups, dim=1).transpose(1, 2)[..., None]
    return torch.cat(pyramid, 1).gather(1, places.expand(-1, -1, -1, x.shape[-1]))


def last_tokens(selection: ReferenceSelection, config: LighthouseConfig) -> Tensor:
    """The last token that each entry covers, int64 [B, Hk, S]."""
    return (selection.indices + 1) * config.pool_factor**selection.levels - 1


def scatter(
    o: Tensor,
    selection: ReferenceSelection,
    seqlen: int,
    config: LighthouseConfig,
    docs: Tensor | None = None,
) -> Tensor:
    """Add each entry's output to the positions that it serves, by level, wide, rounded once.

    With documents [B, N], to those in its own alone.
    """
    batch, _, heads, head_dim = o.shape
    groups = heads // selection.levels.shape[1]
    wide = o.to(accumulate_dtype(o.dtype))
    out = wide.new_zeros(batch, seqlen, heads, head_dim)
    for level in range(config.num_levels):
        window = config.pool_factor**level
        for b in range(batch):
            for h in range(heads):
                at = (selection.levels[b, h // groups] == level).nonzero()[:, 0]
                first = selection.indices[b, h // groups][at] * window + window - 1
                positions = first[:, None] + torch.arange(window, device=o.device)
                inside = positions < seqlen
                if docs is not None:
                    of = docs[b]
                    inside &= of[positions.clamp(max=seqlen - 1)] == of[first][:, None]
                rows = wide[b, at, h][:, None].expand(-1, window, -1)
                # Windows of one level do not overlap: a plain indexed sum has one term a position.
                update = torch.zeros_like(out[b, :, h]).index_put(
                    (positions[inside],), rows[inside]
                )
                added = out[b, :, h] + update
                out = out.clone()
                out[b, :, h] = added
    return out.to(o.dtype)


def lighthouse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: LighthouseConfig,
    scale: float | None = None,
    selection: ReferenceSelection | None = None,
    score_q: Tensor | None = None,
    score_k: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Lighthouse attention of the whole sequence on one device.

    Args:
        q: [B, N, H, D]. k, v: [B, N, Hk, D]. Any float dtype; float64 is the oracle's own.
        config: the layer's sizes.
        scale: of the logits; D ** -0.5 by default.
        selection: entries to use in place of step 2 and 3.
        score_q, score_k: [B, N, H, E], [B, N, Hk, E], what to score on in place of q and k.
        cu_seqlens: documents, as in `documents`; None: each row is one.

    Returns:
        [B, N, H, D], dtype of q, differentiable through everything but the selection.

    Raises:
        ValueError: documents that are none, or begin too often for the config.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    docs = None
    if cu_seqlens is not None:
        docs = documents(cu_seqlens, q.shape[0], q.shape[1]).to(q.device)
        check_documents(docs, config)
    if selection is None:
        with torch.no_grad():
            score_q = q if score_q is None else score_q
            score_k = k if score_k is None else score_k
            sq, sk = token_scores(score_q, score_k, v, config, scale, docs)
            selection = select(sq, sk, config, docs)
    qs, ks, vs = (gather(x, selection, config, docs) for x in (q, k, v))
    of_entries = None
    if docs is not None:
        last = last_tokens(selection, config)
        of_entries = docs[:, None].expand(-1, last.shape[1], -1).gather(2, last)
        of_entries = of_entries.repeat_interleave(q.shape[2] // last.shape[1], dim=1)
    o = causal_attention(qs, ks, vs, scale, of_entries)
    return scatter(o, selection, q.shape[1], config, docs)
