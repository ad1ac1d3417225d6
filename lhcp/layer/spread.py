"""Do scores tell tokens apart? A layer asks once, at its first call."""

import warnings

import torch
from torch import Tensor

CONSTANT = 1e-3
"""Standard deviation over mean below which scores count as constant."""


@torch.no_grad()
def warn_if_constant(score_q: Tensor, score_k: Tensor, valid: Tensor | None = None) -> None:
    """Warn where the squared norms of this rank's tokens hardly differ; waits for the device.

    Args:
        score_q: [B, n, H, E], what queries are scored on; score_k: [B, n, Hk, E].
        valid: bool [B, n], which tokens are not padding; None: all.
    """
    found = [name for name, x in (("q", score_q), ("k", score_k)) if _is_constant(x, valid)]
    if found:
        warnings.warn(
            f"the scores of {' and '.join(found)}, squared norms, differ by less than {CONSTANT:g} "
            "of their mean in some head: rounding, or the index, decides what is selected. Models "
            "that normalise q and k have such norms: pass what they were before the norm as "
            "score_q and score_k; lhcp.diagnose shows more",
            stacklevel=4,
        )


def _is_constant(x: Tensor, valid: Tensor | None) -> bool:
    """Return whether a head's scores are; not where they are zero, nor where there is one."""
    squares = x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(-1).flatten(0, 1)
    if valid is not None:
        squares = squares[valid.flatten()]
    if len(squares) < 2:
        return False
    mean = squares.mean(0)
    # NaN is not below anything.
    constant: Tensor = (squares.std(0) < CONSTANT * mean).any()
    return bool(constant)
