"""`diagnose`: is my selection alive?"""

import torch
import torch.distributed as dist
from torch import Tensor

from lhcp.comm.agreement import compared
from lhcp.comm.layout import LayoutName, make_layout
from lhcp.comm.mesh import Group, Ranks, as_ranks
from lhcp.config import LighthouseConfig
from lhcp.layer.choices import Choices
from lhcp.layer.documents import Bounds
from lhcp.layer.given import Given
from lhcp.layer.select import ScoredSelection, scored_selection
from lhcp.measure.selection_counts import count
from lhcp.measure.selection_report import SelectionReport, summarize


@torch.no_grad()
def diagnose(
    q: Tensor,
    k: Tensor,
    config: LighthouseConfig,
    *,
    group: Group | Ranks = None,
    layout: LayoutName = "zigzag",
    score_q: Tensor | None = None,
    score_k: Tensor | None = None,
    v: Tensor | None = None,
    scale: float | None = None,
    kernels: str = "auto",
    cu_seqlens: Tensor | None = None,
) -> SelectionReport:
    """Select as the layer would, and tell whether the scores tell entries apart.

    Without a group it looks at the tokens that it is given and sends nothing. With one, every rank
    calls it with its part of a sequence and gets the same report of the whole: counts are added up,
    in one message. The answer does not depend on the number of ranks, up to the rounding of sums.

    Args:
        q: [B, N / W, H, D], this rank's queries in layout order, RoPE applied; any float dtype.
        k: [B, N / W, Hk, D], of the dtype of q.
        config: the layer's sizes; N is the whole sequence.
        group, layout: as in `lhcp.lighthouse_attention`.
        score_q, score_k: [B, N / W, H, E], [B, N / W, Hk, E], scored in place of q and k.
        v, scale: values [B, N / W, Hk, D] and logit scale; the "dilated" scorer needs v.
        kernels: "triton", "torch" or "auto".
        cu_seqlens: documents, as in `lhcp.lighthouse_attention`.

    Returns:
        SelectionReport: for each level the spread of the scores, the share of picks by stratum, the
        overlap of the heads' picks and the share of near-ties; and warnings in words. Scores are
        those of the config's scorer, squared norms; padding, if there is any, counts as tokens.

    Raises:
        TypeError, ValueError: as `lhcp.select`; with a group, ranks that were asked for different
            things too.
    """
    ranks = as_ranks(group)
    choices = Choices(layout, kernels=kernels, scale=scale)
    given = Given(None, score_q, score_k)

    def select() -> ScoredSelection:
        documents = None
        if cu_seqlens is not None:
            documents = Bounds(cu_seqlens, q, ranks, layout, config).local()
        packed = given._replace(documents=documents)
        return scored_selection(q, k, v, config, ranks, choices, packed)

    asked = {
        "call": "diagnose",
        "k": str(getattr(k, "shape", type(k))),
        "config": str(config),
        "layout": str(layout),
        "scores given": str(given.asked),
        "documents given": str(cu_seqlens is not None),
    }
    # At every call and not at new ones alone, since nobody diagnoses in a hurry.
    scored = compared(ranks, select, lambda _: asked)
    counts = count(scored, make_layout(layout, ranks.world_size), ranks.rank)
    if ranks.flat is not None and ranks.world_size > 1:
        total = counts.packed()
        dist.all_reduce(total, group=ranks.flat)
        counts = counts.unpacked(total)
    seqlen = q.shape[1] * ranks.world_size
    return summarize(counts, config.pool_factor, seqlen, ranks.world_size)
