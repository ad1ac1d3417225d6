"""Carry out a plan, differentiably: the loop over a rotation, or heads in exchange for tokens."""

import torch
from torch import Tensor

from lhcp.ring.documents import PackedRows
from lhcp.ring.operators import RingAttention
from lhcp.ring.plan import RingPlan
from lhcp.ring.rotation.alltoall import HeadsToTokens, TokensToHeads
from lhcp.timing import Spans


def attention(
    q: Tensor, k: Tensor, v: Tensor, plan: RingPlan, spans: Spans, packed: PackedRows | None = None
) -> tuple[Tensor, Tensor]:
    """Attend to all ranks' keys and values as the plan says.

    Args:
        q: [B, n, H, D]; k, v: [B, n, Hk, D], this rank's tokens.
        packed: the documents of all ranks' tokens, inside which alone is attended; None: a batch
            row is one.

    Returns:
        out [B, n, H, D] in the dtype of q, differentiable in q, k and v; lse [B, H, n], float32
        (float64 for float64), which carries no gradient.
    """
    if plan.rotation != "alltoall" or plan.ranks.world_size == 1:
        out, lse = RingAttention.apply(q, k, v, plan, spans, *(packed or ()))
        return out, lse
    exchange = (plan.ranks, plan.layout, spans)
    with spans.span("alltoall", "wait", 0, q.device):
        q, k, v = TokensToHeads.apply(q, k, v, *exchange)
    alone = plan.on_one_rank(q.shape[2], k.shape[2])
    if packed is not None:
        own = packed.of_heads(plan.ranks.rank, plan.ranks.world_size)
        packed = own.on_one_rank(plan.layout.num_chunks)
    out, lse = RingAttention.apply(q, k, v, alone, spans, *(packed or ()))
    with spans.span("alltoall", "wait", 1, q.device), torch.no_grad():
        lse_rows = HeadsToTokens.apply(lse.transpose(1, 2)[..., None], *exchange)
    with spans.span("alltoall", "wait", 2, q.device):
        out = HeadsToTokens.apply(out, *exchange)
    return out, lse_rows[..., 0].transpose(1, 2)
