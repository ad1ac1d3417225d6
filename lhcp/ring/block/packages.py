"""Block attention through packages: "fa4" (flash-attn-4) and "flash_attn" (flash-attn 2).

Imported where they are used, never before. Their private entry points change between releases, so
what comes back is checked: the number of results, the shape and dtype of lse. The preference is an
H200's (bench/results): flash-attn-4 takes 4-13% less time than cuDNN, and that about half of the
others'.
"""

import importlib
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lhcp.ring.block.base import BackwardInputs, Block, Bounds, Grads, Request
from lhcp.ring.block.packed import Varlen, checked_lse, packed_calls, without_keys
from lhcp.ring.kv import KV
from lhcp.ring.shape import Mask

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


def _fa4_forward(q: Tensor, kv: KV, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    interface = _load("flash_attn.cute.interface")
    results = interface._flash_attn_fwd(
        q, *kv, softmax_scale=scale, causal=mask.causal, return_lse=True
    )
    return _out_and_lse(results, q, "flash-attn-4's _flash_attn_fwd")


def _fa4_backward(inputs: BackwardInputs, mask: Mask, scale: float) -> Grads:
    dout, q, (k, v), out, lse = inputs
    interface = _load("flash_attn.cute.interface")
    results = interface._flash_attn_bwd(
        q,
        k,
        v,
        out,
        dout,
        lse,
        softmax_scale=scale,
        causal=mask.causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    if len(results) < 3:
        raise ImportError(f"flash-attn-4's _flash_attn_bwd returned {len(results)} results")
    return results[0], results[1], results[2]


def _fa4_varlen(bounds: Bounds) -> dict[str, Any]:
    given = {
        "cu_seqlens_q": bounds.q,
        "cu_seqlens_k": bounds.kv,
        "max_seqlen_q": bounds.longest_q,
        "max_seqlen_k": bounds.longest_kv,
    }
    if bounds.all_meet:
        return given
    # It reads keys where a run has none. So none are used where either is empty; what it does not
    # use it does not write.
    used_q, used_kv = bounds.used
    return given | {"seqused_q": used_q, "seqused_k": used_kv}


def _gradients(inputs: BackwardInputs, bounds: Bounds) -> Grads:
    """Return memory for dq, dk, dv; zeros where a kernel may leave some of it unwritten."""
    make = torch.empty_like if bounds.all_meet else torch.zeros_like
    of = (inputs.q, *inputs.kv)
    dq, dk, dv = (make(x, memory_format=torch.contiguous_format) for x in of)
    return dq, dk, dv


def _fa4_varlen_forward(
    q: Tensor, kv: KV, mask: Mask, bounds: Bounds, scale: float
) -> tuple[Tensor, Tensor]:
    interface = _load("flash_attn.cute.interface")
    into = {}
    if not bounds.all_meet:
        into["out"] = torch.zeros_like(q, memory_format=torch.contiguous_format)
        into["lse"] = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.float32)
    results = interface._flash_attn_fwd(
        q,
        *kv,
        softmax_scale=scale,
        causal=mask.causal,
        return_lse=True,
        **into,
        **_fa4_varlen(bounds),
    )
    source = "flash-attn-4's _flash_attn_fwd"
    if bounds.all_meet:
        return results[0], checked_lse(results[1], q, source)
    return results[0], without_keys(results[1], q, source)


def _fa4_varlen_backward(inputs: BackwardInputs, mask: Mask, bounds: Bounds, scale: float) -> Grads:
    dout, q, (k, v), out, lse = inputs
    interface = _load("flash_attn.cute.interface")
    dq, dk, dv = _gradients(inputs, bounds)
    results = interface._flash_attn_bwd(
        q,
        k,
        v,
        out,
        dout,
        lse,
        softmax_scale=scale,
        causal=mask.causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        dq=dq,
        dk=dk,
        dv=dv,
        **_fa4_varlen(bounds),
    )
    if len(results) < 3:
        raise ImportError(f"flash-attn-4's _flash_attn_bwd returned {len(results)} results")
    return results[0], results[1], results[2]


def _fa2_options(mask: Mask, scale: float) -> dict[str, Any]:
    return {
        "dropout_p": 0.0,
        "softmax_scale": scale,
        "causal": mask.causal,
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
        "alibi_slopes": None,
    }


def _fa2_forward(q: Tensor, kv: KV, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    interface = _load("flash_attn.flash_attn_interface")
    results = interface._flash_attn_forward(
        q,
        *kv,
        **_fa2_options(mask, scale),
        return_softmax=False,
    )
    return _out_and_lse(results, q, "flash-attn's _flash_attn_forward")


def _fa2_backward(inputs: BackwardInputs, mask: Mask, scale: float) -> Grads:
    dout, q, (k, v), out, lse = inputs
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
        **_fa2_options(mask, scale),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return dq, dk, dv


def _fa2_varlen(bounds: Bounds) -> dict[str, Any]:
    # A longest run of one query would mean "decode" to the kernel: one query in each.
    return {
        "cu_seqlens_q": bounds.q,
        "cu_seqlens_k": bounds.kv,
        "max_seqlen_q": max(bounds.longest_q, 2),
        "max_seqlen_k": max(bounds.longest_kv, 2),
    }


def _fa2_varlen_forward(
    q: Tensor, kv: KV, mask: Mask, bounds: Bounds, scale: float
) -> tuple[Tensor, Tensor]:
    interface = _load("flash_attn.flash_attn_interface")
    results = interface._flash_attn_varlen_forward(
        q,
        *kv,
        **_fa2_options(mask, scale),
        return_softmax=False,
        **_fa2_varlen(bounds),
    )
    source = "flash-attn's _flash_attn_varlen_forward"
    if bounds.all_meet:
        return results[0], checked_lse(results[1], q, source)
    return results[0], without_keys(results[1], q, source)


def _fa2_varlen_backward(inputs: BackwardInputs, mask: Mask, bounds: Bounds, scale: float) -> Grads:
    dout, q, (k, v), out, lse = inputs
    interface = _load("flash_attn.flash_attn_interface")
    dq, dk, dv = _gradients(inputs, bounds)
    interface._flash_attn_varlen_backward(
        dout.contiguous(),
        q,
        k,
        v,
        out.contiguous(),
        lse,
        dq,
        dk,
        dv,
        **_fa2_options(mask, scale),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **_fa2_varlen(bounds),
    )
    return dq, dk, dv


# Compute capability -> (largest head_dim, others that have a kernel of their own), as the package
# checks them (flash_attn/cute/interface.py of 4.0.0b36, _validate_head_dims). Others it does not
# check: what its kernels share.
_FA4_HEAD_DIMS = {9: (256, ()), 10: (128, (256,)), 11: (128, (256,))}


def _fa4_head_dim(asked: Request) -> str | None:
    major = None if asked.capability is None else asked.capability[0]
    largest, others = _FA4_HEAD_DIMS.get(major or 0, (128, ()))
    if asked.head_dim <= largest or asked.head_dim in others:
        return None
    also = "".join(f", and {other}" for other in others)
    where = "an unknown card" if major is None else f"compute capability {major}"
    takes = f"on {where} it takes up to {largest}{also}"
    return f"head_dim={asked.head_dim}, {takes}"


FA4 = Block(
    name="fa4",
    forward=_fa4_forward,
    backward=_fa4_backward,
    devices=("cuda",),
    dtypes=_HALF,
    preference=10,
    max_head_dim=256,
    head_dim_multiple=8,
    other_rules=_fa4_head_dim,
    packed=packed_calls(Varlen(_fa4_varlen_forward, _fa4_varlen_backward)),
    missing=_missing("flash_attn", "cute", "pip install 'lhcp[fa4]'", needs="cutlass"),
)

FLASH_ATTN = Block(
    name="flash_attn",
    forward=_fa2_forward,
    backward=_fa2_backward,
    devices=("cuda",),
    dtypes=_HALF,
    preference=30,
    max_head_dim=256,
    head_dim_multiple=8,
    packed=packed_calls(Varlen(_fa2_varlen_forward, _fa2_varlen_backward)),
    missing=_missing("flash_attn", "flash_attn_interface", "pip install 'lhcp[flash]'"),
)
