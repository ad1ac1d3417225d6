"""The verdict on low precision: an error budget taken from the data, not a constant."""

import torch
from torch import Tensor


def assert_close_float64(name: str, ours: Tensor, reference: Tensor, budget: float = 1e-10) -> None:
    """Check float64 results: the largest difference is at most `budget` times the largest value."""
    assert ours.dtype == torch.float64, f"{name} is {ours.dtype}"
    assert ours.shape == reference.shape, f"{name}: {ours.shape} against {reference.shape}"
    scale = max(1.0, reference.abs().max().item())
    error = (ours - reference).abs().max().item()
    assert error <= budget * scale, f"{name}: error {error:.3e} over {budget:.0e} x {scale:.3g}"


def assert_within_budget(
    name: str, ours: Tensor, torch_same_dtype: Tensor, exact: Tensor, handed_on: float = 0.0
) -> None:
    """Check a low-precision result by the error of plain torch in the same dtype.

    err(ours, float64) <= 2 x (err(torch, float64) + eps(dtype) x max |float64| + handed_on).

    Args:
        ours: the result.
        torch_same_dtype: the reference in the dtype of `ours`.
        exact: the reference in float64, from the same rounded inputs.
        handed_on: error of an intermediate result that plain torch has no need to round, for
            example the float32 lse between two steps of a ring.
    """
    assert exact.dtype == torch.float64 and ours.shape == exact.shape, name
    assert bool(ours.isfinite().all()), f"{name}: not finite"
    band = torch.finfo(ours.dtype).eps * exact.abs().max().item()
    theirs = (torch_same_dtype.double() - exact).abs().max().item()
    error = (ours.double() - exact).abs().max().item()
    assert error <= 2 * (theirs + band + handed_on), (
        f"{name}: error {error:.3e}, torch in {ours.dtype} has {theirs:.3e}, rounding {band:.3e}, "
        f"handed on {handed_on:.3e}"
    )
