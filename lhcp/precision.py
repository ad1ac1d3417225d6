"""The one rule of precision: sums are wider than what they sum, and are rounded once."""

import torch


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums, scores and lse are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
