"""`select`: this rank's entries, without communication; and this rank's sizes."""

from typing import NamedTuple

import torch
from torch import Tensor

from lhcp.checks import check_qk, check_qkv
from lhcp.comm.layout import LayoutName, make_layout
from lhcp.comm.mesh import Group, Ranks, as_ranks
from lhcp.config import LighthouseConfig
from lhcp.layer.choices import Choices
from lhcp.layer.documents import Bounds
from lhcp.layer.given import Given, scored_on
from lhcp.layer.plan import choose_kernels
from lhcp.lighthouse import operators
from lhcp.lighthouse.geometry import Geometry
from lhcp.lighthouse.kernel_set import QKV
from lhcp.lighthouse.score import SCORERS, ScoreInputs
from lhcp.lighthouse.select import Selection
from lhcp.operators import pack_integers


def local_geometry(
    config: LighthouseConfig, num_tokens: int, ranks: Ranks, layout: LayoutName
) -> Geometry:
    """Return this rank's geometry; every rule between sizes and ranks is checked here.

    Raises:
        ValueError: the sequence, the strata or the layout do not fit each other.
    """
    cut = make_layout(layout, ranks.world_size)
    return Geometry.local(config, num_tokens, ranks.world_size, cut.chunks_per_rank, ranks.rank)


def select(
    q: Tensor,
    k: Tensor,
    *,
    config: LighthouseConfig,
    group: Group | Ranks = None,
    layout: LayoutName = "zigzag",
    score_q: Tensor | None = None,
    score_k: Tensor | None = None,
    kernels: str = "auto",
    v: Tensor | None = None,
    scale: float | None = None,
    valid: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Selection:
    """Select this rank's entries, without communication: steps 1 to 4 of the method.

    The result does not depend on the number of ranks: a stratum's entries are the same bit for bit.
    Within its stratum, selection looks ahead: it may depend on later tokens (as in the paper).

    Args:
        q: [B, N / W, H, D], this rank's queries in layout order, RoPE applied.
        k: [B, N / W, Hk, D].
        config: the layer's sizes; N is the whole sequence.
        group, layout: as in `lighthouse_attention`.
        score_q, score_k: [B, N / W, H, E], [B, N / W, Hk, E], scored in place of q and k.
        kernels: "triton", "torch" or "auto".
        v, scale: values [B, N / W, Hk, D] and logit scale; the "dilated" scorer needs v.
        valid, cu_seqlens: as in `lighthouse_attention`.

    Returns:
        Selection, which carries no gradient.

    Raises:
        TypeError, ValueError: shapes, dtypes or sizes that do not fit, or v missing.
    """
    choices, ranks = Choices(layout, kernels=kernels, scale=scale), as_ranks(group)
    documents = None
    if cu_seqlens is not None:
        documents = Bounds(cu_seqlens, q, ranks, layout, config).local()
    given = Given(None, score_q, score_k, valid, documents)
    return scored_selection(q, k, v, config, ranks, choices, given).selection


class ScoredSelection(NamedTuple):
    """A selection, and the scores of levels 1 to L-1 that it was made by."""

    geometry: Geometry
    sq: Tensor
    """[B, Hk, pooled_size], wide, level 1 first; so is sk."""
    sk: Tensor
    selection: Selection
    positions: Tensor | None = None
    """[B, n] of the tokens inside their documents; None: no documents."""


def scored_selection(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    config: LighthouseConfig,
    ranks: Ranks,
    choices: Choices,
    given: Given,
) -> ScoredSelection:
    """Select as `select`, which has the rules; return the scores too."""
    if v is None:
        check_qk(q, k)
    else:
        check_qkv(q, k, v)
    geom = local_geometry(config, q.shape[1], ranks, choices.layout)
    score_q, score_k = scored_on(given, q, k, config)
    kernels = choose_kernels(choices.kernels, q.dtype, q.device)
    scorer = SCORERS[config.scorer]
    if scorer.needs_values and v is None:
        raise ValueError(f"scorer={config.scorer!r} attends with the values: pass v=")
    inputs = ScoreInputs(geom, config, kernels, choices.scale_of(q), given.positions)
    with torch.no_grad():
        sq, sk = scorer.score(QKV(score_q, score_k, k if v is None else v), inputs)
        picked = operators.select_entries(sq, sk, pack_integers(geom), kernels, given.positions)
        return ScoredSelection(geom, sq, sk, Selection(*picked), given.positions)
