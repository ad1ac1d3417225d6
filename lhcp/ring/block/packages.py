"""Block attention through packages: "fa4" (flash-attn-4) and "flash_attn" (flash-attn 2).

Imported where they are used, never before. Their private entry points change between releases, so
what comes back is checked: the number of results, the shape and dtype of lse.
"""

import importlib
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lhcp.ring.block.base import Block

_HALF = (torch.bfloat16, torch.float16)


@cache
def _load(module: str) -> Any:
    return importlib.import_module(module)


def _missing(package: str, submodule: str, install: str, needs: str | None = None) -> str | None:
    """Look for a submodule without importing anything, as importing lhcp must stay quick.

    Args:
        needs: another package that the submodule imports, which not every release that ships the
            submodule installs: flash-attn 2 has a copy of flash-attn-4 that does not import.
    """
    if needs is not None and importlib.util.find_spec(needs) is None:
        return f"the package {needs} is not installed; {install}"
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return f"the package is not installed; {install}"
    for folder in map(Path, spec.submodule_search_locations):
        if (folder / submodule).is_dir() or (folder / f"{submodule}.py").is_file():
            return None
    return f"the installed {package} has no {submodule}; {install}"


def _out_and_lse(results: Any, q: Tensor, source: str) -> tuple[Tensor, Tensor]:
    """Take (out, lse) from a kernel's results, or say what is not as expected."""
    wanted = (q.shape[0], q.shape[2], q.shape[1])
    if not isinstance(results, tuple | list) or len(results) < 2:
        raise ImportError(f"{source} returned {type(results).__name__}, expected (out, lse, ...)")
    out, lse = results[0], results[1]
    if lse is None or tuple(lse.shape) != wanted or lse.dtype != torch.float32:
        seen = None if lse is None else (tuple(lse.shape), lse.dtype)
        raise ImportError(f"{source} returned lse {seen}, expected float32 {wanted}")
    return out, lse


def _fa4_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    interface = _load("flash_attn.cute.interface")
    results = interface._flash_attn_fwd(
        q, k, v, softmax_scale=scale, causal=causal, return_lse=True
    )
    return _out_and_lse(results, q, "flash-attn-4's _flash_attn_fwd")


def _fa4_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    interface = _load("flash_attn.cute.interface")
    results = interface._flash_attn_bwd(
        q,
        k,
        v,
        out,
        dout,
        lse,
        softmax_scale=scale,
        causal=causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    if len(results) < 3:
        raise ImportError(f"flash-attn-4's _flash_attn_bwd returned {len(results)} results")
    return results[0], results[1], results[2]


def _fa2_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    interface = _load("flash_attn.flash_attn_interface")
    results = interface._flash_attn_forward(
        q,
        k,
        v,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        return_softmax=False,
    )
    return _out_and_lse(results, q, "flash-attn's _flash_attn_forward")


def _fa2_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    interface = _load("flash_attn.flash_attn_interface")
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    interface._flash_attn_backward(
        dout.contiguous(),
        q,
        k,
        v,
        out.contiguous(),
        lse.contiguous(),
        dq,
        dk,
        dv,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return dq, dk, dv


FA4 = Block(
    name="fa4",
    forward=_fa4_forward,
    backward=_fa4_backward,
    devices=("cuda",),
    dtypes=_HALF,
    max_head_dim=256,
    head_dim_multiple=8,
    missing=_missing("flash_attn", "cute", "pip install 'lhcp[fa4]'", needs="cutlass"),
)

FLASH_ATTN = Block(
    name="flash_attn",
    forward=_fa2_forward,
    backward=_fa2_backward,
    devices=("cuda",),
    dtypes=_HALF,
    max_head_dim=256,
    head_dim_multiple=8,
    missing=_missing("flash_attn", "flash_attn_interface", "pip install 'lhcp[flash]'"),
)
