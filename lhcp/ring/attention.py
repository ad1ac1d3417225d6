"""Carry out a plan, differentiably: the loop over a rotation, or heads in exchange for tokens."""

import torch
from torch import Tensor

from lhcp.ring.operators import RingAttention
from lhcp.ring.plan import RingPlan
from lhcp.ring.rotation.alltoall import HeadsToTokens, TokensToHeads
from lhcp.timing import Spans


def attention(
    q: Tensor, k: Tensor, v: Tensor, plan: RingPlan, spans: Spans
) -> tuple[Tensor, Tensor]:
    """Attend to all ranks' keys and values as the plan says.

    Args:
        q: [B, n, H, D]; k, v: [B, n, Hk, D], this rank's tokens.

    Returns:
        out [B, n, H, D] in the dtype of q, differentiable in q, k and v; lse [B, H, n], float32
        (float64 for float64), which carries no gradient.
    """
    if plan.rotation != "alltoall" or plan.ranks.world_size == 1:
        out, lse = RingAttention.apply(q, k, v, plan, spans)
        return out, lse
    exchange = (plan.ranks, plan.layout, spans)
    with spans.span("alltoall", "wait", 0, q.device):
        q, k, v = TokensToHeads.apply(q, k, v, *exchange)
    alone = plan.on_one_rank(q.shape[2], k.shape[2])
    out, lse = RingAttention.apply(q, k, v, alone, spans)
    with spans.span("alltoall", "wait", 1, q.device), torch.no_grad():
        lse_rows = HeadsToTokens.apply(lse.transpose(1, 2)[..., None], *exchange)
    with spans.span("alltoall", "wait", 2, q.device):
        out = HeadsToTokens.apply(out, *exchange)
    return out, lse_rows[..., 0].transpose(1, 2)
