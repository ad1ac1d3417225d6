"""Checks of what callers pass in, before anything is sent: the value, the rule, what would fit."""

import torch
from torch import Tensor

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_AXES = "axes are [batch, seqlen, heads, head_dim]: transpose(1, 2) makes them of torch's order"

_MOST_HEADS = 256
"""More than any model has: where they outnumber the tokens, too, these are tokens."""


def shape_of(x: Tensor) -> str:
    """Return shape, dtype and device of a tensor, for an error message."""
    return f"{list(x.shape)} {x.dtype} on {x.device}"


def check_qk(q: Tensor, k: Tensor) -> None:
    """Check that q [B, n, H, D] and k [B, n, Hk, D] belong together, as `check_qkv` does."""
    _check({"q": q, "k": k})


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check that q [B, n, H, D], k and v [B, n, Hk, D] belong together.

    Raises:
        TypeError: something is not a tensor, or dtypes differ or are not floating point.
        ValueError: ranks, shapes, devices or head counts do not fit.
    """
    _check({"q": q, "k": k, "v": v})


def check_plain(name: str, x: Tensor) -> None:
    """Check that what a caller passes is a tensor of this rank's own.

    Raises:
        TypeError: it is none, or a DTensor, whose sharding is not ours to read.
    """
    if type(x) is Tensor:
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if hasattr(x, "to_local") and hasattr(x, "placements"):
        raise TypeError(
            f"{name} is a DTensor: pass {name}.to_local(), this rank's part (whole heads under "
            f"tensor parallelism, this rank's tokens of the sequence); it has {x.placements}"
        )


def as_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v of one dtype where torch.autocast is on and theirs differ: its own.

    torch's own scaled_dot_product_attention takes such inputs: rotary tables in float32 raise q and
    k under autocast, and v stays low. What agrees is left as it is, float32 too.
    """
    if not isinstance(q, Tensor) or q.dtype is getattr(v, "dtype", None) is getattr(
        k, "dtype", None
    ):
        return q, k, v
    kind = q.device.type
    if not torch.is_autocast_enabled(kind) or not all(
        isinstance(x, Tensor) and x.is_floating_point() for x in (k, v)
    ):
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _check(named: dict[str, Tensor]) -> None:
    for name, x in named.items():
        check_plain(name, x)
        if x.ndim != 4:
            raise ValueError(f"{name} is {shape_of(x)}: must be [batch, seqlen, heads, head_dim]")
        if x.dtype not in _FLOATS:
            raise TypeError(f"{name} is {x.dtype}: must be one of {', '.join(map(str, _FLOATS))}")
    # Nothing is put into words before something is wrong: this runs in every call.
    if len({x.dtype for x in named.values()}) > 1:
        raise TypeError(
            f"{', '.join(named)} must have one dtype: cast them, for example with x.to(v.dtype); "
            f"rotary tables in float32 raise q and k: {_listing(named)}"
        )
    if len({x.device for x in named.values()}) > 1:
        raise ValueError(f"{_listing(named)}: must be on one device")
    q, k = named["q"], named["k"]
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"{_listing(named)}: no axis may be empty")
    if "v" in named and named["v"].shape != k.shape:
        raise ValueError(f"{_listing(named)}: k and v must have the same shape")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"{_listing(named)}: q and k must agree in all axes but the heads; {_AXES}"
        )
    # In this order, so that a graph does not depend on the number of tokens.
    if q.shape[2] > _MOST_HEADS and q.shape[2] > q.shape[1]:
        raise ValueError(f"{_listing(named)}: {q.shape[2]} heads of {q.shape[1]} tokens; {_AXES}")
    if q.shape[2] % k.shape[2]:
        fits = [n for n in range(1, q.shape[2] + 1) if q.shape[2] % n == 0]
        raise ValueError(
            f"{_listing(named)}: the {q.shape[2]} query heads must be a multiple of the "
            f"{k.shape[2]} kv heads; kv heads that fit: {', '.join(map(str, fits))}; {_AXES}"
        )


def _listing(named: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {shape_of(x)}" for name, x in named.items())


def check_scores(
    score_q: Tensor | None, score_k: Tensor | None, q: Tensor, k: Tensor
) -> tuple[Tensor, Tensor]:
    """Check score_q [B, n, H, E] and score_k [B, n, Hk, E] against q and k; None means q or k."""
    score_q = q if score_q is None else score_q
    score_k = k if score_k is None else score_k
    for name, score, x in (("score_q", score_q, q), ("score_k", score_k, k)):
        check_plain(name, score)
        if score.ndim != 4 or score.shape[:3] != x.shape[:3] or score.shape[3] < 1:
            raise ValueError(
                f"{name} is {shape_of(score)}: must be {[*x.shape[:3], 'E']}, like what it replaces"
            )
        if score.dtype not in _FLOATS or score.device != x.device:
            raise TypeError(f"{name} is {shape_of(score)}: must be floating point on {x.device}")
    return score_q, score_k


def check_valid(valid: Tensor, q: Tensor) -> None:
    """Check that valid, which tokens are real, is bool [B, n] on the device of q [B, n, H, D].

    Raises:
        TypeError, ValueError: it is not.
    """
    check_plain("valid", valid)
    if valid.dtype != torch.bool:
        raise TypeError(
            f"valid is {shape_of(valid)}: must be torch.bool {list(q.shape[:2])}, or None"
        )
    if valid.shape != q.shape[:2] or valid.device != q.device:
        raise ValueError(
            f"valid is {shape_of(valid)}: must be {list(q.shape[:2])} on {q.device}, this rank's "
            "tokens, true for those that are not padding"
        )


def check_finite(name: str, x: Tensor, whose: str) -> None:
    """Check that x [B, n, heads, D] has no infinity and no NaN; the host waits for its device.

    Args:
        whose: of which rank it is, in words.

    Raises:
        ValueError: it has; the message has how many, and the first.
    """
    bad = ~x.detach().isfinite()
    if not bool(bad.any()):
        return
    row, token, head, dim = first = bad.nonzero()[0].tolist()
    raise ValueError(
        f"{name} of {whose} has {int(bad.sum())} of {x.numel()} values that are not finite, the "
        f"first {x[row, token, head, dim].item()} at {first}, [sequence, token of the rank, head, "
        "dim]"
    )


def check_scale(scale: float | None) -> None:
    """Check that the factor of the logits is a plain number, or None for the default.

    Raises:
        TypeError: it is not: a tensor or a parameter would get no gradient here.
    """
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float)):
        raise TypeError(
            f"scale is a {type(scale).__name__}: must be a float or None; a learnt one gets no "
            "gradient here: multiply q by it before the call"
        )
