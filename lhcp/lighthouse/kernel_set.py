"""What one implementation of the local stages is: steps 1 to 4 and 6 of the method."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from lhcp.lighthouse.geometry import Geometry

Positions = Tensor | None


class QKV(NamedTuple):
    """Queries [B, *, H, D], keys and values [B, *, Hk, D] of the same tokens or entries."""

    q: Tensor
    k: Tensor
    v: Tensor


class Pooled(NamedTuple):
    """Levels 1 to L-1, level 1 first."""

    means: QKV
    """[B, pooled_size, heads, D]."""
    sq: Tensor
    """[B, Hk, pooled_size], or empty where no scores were asked for; so is sk."""
    sk: Tensor


@dataclass(frozen=True)
class KernelSet:
    """One implementation of the local stages. All tensors are this rank's.

    `positions`, int32 [B, n], are those of the tokens inside their documents; None: no documents.
    """

    pool_and_score: Callable[[QKV, Geometry, bool, Positions], Pooled]
    """(tokens, geom, with_scores, positions) -> means and scores."""
    score_tensors: Callable[[Tensor, Tensor, Geometry, Positions], tuple[Tensor, Tensor]]
    """(score_q, score_k, geom, positions) -> scores [B, Hk, pooled_size]."""
    select: Callable[[Tensor, Tensor, Geometry, Positions], tuple[Tensor, Tensor]]
    """(sq, sk, geom, positions) -> (entries [B, Hk, S], row_of_entry [B, Hk, pyramid_size]),
    int32."""
    gather: Callable[[QKV, QKV, Tensor, Geometry], QKV]
    """(tokens, means, entries, geom) -> the sub-sequence."""
    gather_backward: Callable[[QKV, Tensor, Geometry, Positions], QKV]
    """(gradients of the sub-sequence, row_of_entry, geom, positions) -> those of the tokens."""
    last_rows: Callable[[Tensor, Tensor, Geometry], Tensor]
    """(o, row_of_entry, geom) -> what each chunk owes the next: [B, num_chunks, L-1, H, D]."""
    scatter: Callable[[Tensor, Tensor, Geometry, Positions], Tensor]
    """(o [B, S, H, D], row_of_entry, geom, positions) -> [B, n, H, D]."""
    scatter_edges: Callable[[Tensor, Tensor, Tensor, Tensor, Geometry, Positions], None]
    """(out, o, row_of_entry, halo, geom, positions): completes `out` with what chunks owe each
    other."""
    scatter_backward: Callable[[Tensor, Tensor, Tensor, Geometry, Positions], Tensor]
    """(dout, entries, row_of_entry, geom, positions) -> do [B, S, H, D]; one map is enough,
    either."""
    edge_grads: Callable[[Tensor, Geometry, Positions], Tensor]
    """(dout, geom, positions) -> the gradient of the halo, [B, num_chunks, L-1, H, D]."""
    add_last_grads: Callable[[Tensor, Tensor, Tensor, Tensor, Geometry], None]
    """(do, dout, received, row_of_entry, geom): completes `do` with what `last_rows` sent."""
