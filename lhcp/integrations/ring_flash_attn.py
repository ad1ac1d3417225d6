"""The `ring-flash-attn` package as an alternative dense ring: its zigzag ring, over flash-attn 2.

The whole ring is the package's, forward and backward; nothing of `lhcp.ring` runs. Its
private module is loaded without the package's `__init__`, whose adapter does not import beside
transformers >= 5 and is not needed here.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lhcp.comm.layout import Layout
from lhcp.layer.choices import PackageRing
from lhcp.ring.block.base import Request
from lhcp.ring.plan import RingPlan
from lhcp.ring.shape import CAUSAL, Mask

PACKAGE = "ring_flash_attn"
INSTALL = "pip install 'lhcp[flash]'"
DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


def check_ring_flash_attn(asked: Request, layout: Layout, mask: Mask) -> None:
    """Check that the package can do such inputs and that it is there.

    Raises:
        ValueError: it cannot; the message names what works.
        ImportError: the package or flash-attn is missing or does not import.
    """
    other, head_dim = 'or another rotation, for example rotation="auto"', asked.head_dim
    if asked.device != "cuda":
        raise ValueError(f"{PACKAGE}: inputs are on {asked.device}; it takes cuda, {other}")
    if asked.dtype not in DTYPES:
        raise ValueError(
            f"{PACKAGE}: inputs are {asked.dtype}; it takes bfloat16 and float16, {other}"
        )
    if head_dim > MAX_HEAD_DIM or head_dim % 8:
        raise ValueError(
            f"{PACKAGE}: head_dim={head_dim}; it takes multiples of 8 up to {MAX_HEAD_DIM}, {other}"
        )
    if layout.name != "zigzag":
        raise ValueError(f"{PACKAGE}: layout={layout.name!r}; it takes 'zigzag', {other}")
    if asked.documents:
        raise ValueError(f"{PACKAGE}: cu_seqlens; its zigzag ring takes no documents, {other}")
    if not mask.causal:
        raise ValueError(f"{PACKAGE}: causal=False; its zigzag ring is causal, {other}")
    _zigzag_function()


def ring_flash_attn(
    q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend causally to zigzag-sharded tokens by ring-flash-attn; exact and differentiable.

    Args:
        q: [B, n, H, D], this rank's two chunks in order. k, v: [B, n, Hk, D]. bfloat16 or float16.
        group: the ranks; None is the default group, which must exist.
        scale: of the logits.

    Returns:
        out [B, n, H, D] in the dtype of q; lse [B, H, n] float32, which carries no gradient.

    Raises:
        ValueError, ImportError: see `check_ring_flash_attn`; also where no group exists.
    """
    asked = Request(q.dtype, q.shape[3], q.device.type)
    check_ring_flash_attn(asked, Layout("zigzag", 1), CAUSAL)
    if group is None and not dist.is_initialized():
        raise ValueError(f"{PACKAGE}: group=None and no default group; pass a ProcessGroup")
    out, lse, *_ = _zigzag_function()(
        q,
        k,
        v,
        softmax_scale=scale,
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        return_attn_probs=True,
        group=group,
    )
    return out, lse.detach()


def _attend(q: Tensor, k: Tensor, v: Tensor, plan: RingPlan) -> tuple[Tensor, Tensor]:
    return ring_flash_attn(q, k, v, plan.ranks.flat, plan.scale)


RING_FLASH_ATTN = PackageRing(check_ring_flash_attn, _attend)
"""The rotation "ring_flash_attn"."""


@cache
def _zigzag_function() -> Callable[..., Any]:
    function: Callable[..., Any] = load_module("zigzag_ring_flash_attn").zigzag_ring_flash_attn_func
    return function


def load_module(name: str) -> ModuleType:
    """Return a module of the package without running the package's `__init__`.

    Raises:
        ImportError: it, or flash-attn, is missing or does not import.
    """
    module = f"{PACKAGE}.{name}"
    return sys.modules[module] if module in sys.modules else _load_without_init(module)


def _load_without_init(module: str) -> ModuleType:
    """Import a submodule under a bare parent, and leave sys.modules as it was."""
    spec = importlib.util.find_spec(PACKAGE)  # does not import it
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError(f"the package ring-flash-attn is not installed; {INSTALL}")
    before = _loaded()
    for name in before:
        del sys.modules[name]
    bare = importlib.machinery.ModuleSpec(PACKAGE, None, is_package=True)
    bare.submodule_search_locations = spec.submodule_search_locations
    sys.modules[PACKAGE] = importlib.util.module_from_spec(bare)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"the installed ring-flash-attn does not import: {error}; {INSTALL}"
        ) from error
    finally:
        for name in _loaded():
            del sys.modules[name]
        sys.modules.update(before)


def _loaded() -> dict[str, ModuleType]:
    """Return what is loaded of the package now."""
    return {
        name: module
        for name, module in sys.modules.items()
        if name == PACKAGE or name.startswith(f"{PACKAGE}.")
    }
