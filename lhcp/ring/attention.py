"""Carry out a plan, differentiably: the loop over a rotation, or around it heads for tokens."""

import torch
from torch import Tensor

from lhcp.ring.documents import PackedRows
from lhcp.ring.heads import SHARE_HEADS
from lhcp.ring.operators import RingAttention
from lhcp.ring.plan import RingPlan
from lhcp.ring.rotation.alltoall import HeadsToTokens, TokensToHeads
from lhcp.timing import Spans


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: RingPlan,
    spans: Spans,
    packed: PackedRows | None = None,
    with_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attend to all ranks' keys and values as the plan says.

    Args:
        q: [B, n, H, D]; k, v: [B, n, Hk, D], this rank's tokens.
        packed: the documents of all ranks' tokens, inside which alone is attended; None: a batch
            row is one.
        with_lse: False: lse is not asked for, on any rank. Where heads are exchanged it would be a
            message of its own.

    Returns:
        out [B, n, H, D] in the dtype of q, differentiable in q, k and v; lse [B, H, n], float32
        (float64 for float64), which carries no gradient; or None.
    """
    if plan.rotation not in SHARE_HEADS:
        out, lse = RingAttention.apply(q, k, v, plan, spans, *(packed or (None, None)))
        return out, lse
    left = plan.after_exchange()
    if packed is not None:
        packed = packed.after_exchange(plan, left)
    if plan.sharing_ranks == 1:
        out, lse = RingAttention.apply(q, k, v, left, spans, *(packed or (None, None)))
        return out, lse
    with spans.span("alltoall", "wait", 0, q.device):
        q, k, v = TokensToHeads.apply(q, k, v, plan, spans)
    out, lse = RingAttention.apply(q, k, v, left, spans, *(packed or (None, None)))
    with spans.span("alltoall", "wait", 1, q.device):
        out = HeadsToTokens.apply(out, plan, spans)
    if not with_lse:
        return out, None
    with spans.span("alltoall", "wait", 2, q.device), torch.no_grad():
        lse_rows = HeadsToTokens.apply(lse.transpose(1, 2)[..., None], plan, spans)
    return out, lse_rows[..., 0].transpose(1, 2)
