"""Fresh random inputs of a named seed, and configs that do real work at small sizes."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lhcp.config import LighthouseConfig, Scorer


def qkv(
    seqlen: int,
    *,
    batch: int = 1,
    num_heads: int = 4,
    num_kv_heads: int | None = None,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, k, v [batch, seqlen, heads, head_dim] and an output gradient like q.

    Rows differ in size by an order of magnitude, so that scores do, and selection has work to do.
    """
    generator = torch.Generator().manual_seed(seed)
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads

    def draw(heads: int) -> Tensor:
        rows = torch.randn(batch, seqlen, heads, head_dim, generator=generator, dtype=torch.float64)
        sizes = torch.rand(batch, seqlen, heads, 1, generator=generator, dtype=torch.float64)
        return (rows * (0.2 + 1.8 * sizes)).to(dtype).to(device)

    return draw(num_heads), draw(num_kv_heads), draw(num_kv_heads), draw(num_heads)


def small_config(
    num_levels: int = 3,
    pool_factor: int = 2,
    num_strata: int = 8,
    picks: int = 2,
    scorer: Scorer = "norm",
    dilation: int = 4,
) -> tuple[LighthouseConfig, int]:
    """Return a config and a whole seqlen with S <= N / 2 and coarsest entries >= 4 picks a stratum.

    For every stratum: coarsest entries e, S / C = e + (L - 1) p m <= e p**(L-1) / 2. Two levels of
    pairs cannot halve a sequence: there S <= 3 N / 4.
    """
    window = pool_factor ** (num_levels - 1)
    share = 0.75 if window == 2 else 0.5
    coarsest = 4 * picks
    while coarsest + (num_levels - 1) * pool_factor * picks > share * coarsest * window:
        coarsest += picks
    config = LighthouseConfig(
        num_levels=num_levels,
        pool_factor=pool_factor,
        topk=picks * num_strata,
        num_strata=num_strata,
        scorer=scorer,
        dilation=dilation,
    )
    return config, coarsest * config.seqlen_multiple


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill what torch.empty, empty_like and Tensor.new_empty return: NaN, or a wild integer.

    An element that nothing writes then shows in the result, whatever the allocator left there.
    """

    def poisoned(original: Any) -> Any:
        @functools.wraps(original)
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            x: Tensor = original(*args, **kwargs)
            # A leaf that will have a gradient cannot be written in place.
            into = x.detach()
            if x.is_floating_point() or x.is_complex():
                into.fill_(torch.nan)
            else:
                into.fill_(True if x.dtype == torch.bool else torch.iinfo(x.dtype).max // 3)
            return x

        return allocate

    owners: list[tuple[Any, str]] = [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ]
    originals = [getattr(owner, name) for owner, name in owners]
    for (owner, name), original in zip(owners, originals, strict=True):
        setattr(owner, name, poisoned(original))
    try:
        yield
    finally:
        for (owner, name), original in zip(owners, originals, strict=True):
            setattr(owner, name, original)
