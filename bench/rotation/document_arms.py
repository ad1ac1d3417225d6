"""What packed documents are timed beside: other packages' varlen attention, on one GPU or a ring.

Each is asked for once, with the documents of a sequence, and returns a function of q, k, v of this
process's tokens. Whatever is not there says why.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lhcp.comm.mesh import Ranks
from lhcp.integrations.ring_flash_attn import load_module

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q, k, v) -> out, all [1, n, heads, D]."""


@dataclass(frozen=True)
class Documents:
    """The bounds of the documents of one sequence, as kernels are told."""

    cu_seqlens: Tensor
    """int32 [num_docs + 1] on the device."""
    longest: int

    @classmethod
    def of(cls, starts: Tensor, seqlen: int, device: torch.device) -> "Documents":
        """Take first tokens, int64 on the CPU."""
        bounds = torch.cat([starts, torch.tensor([seqlen])])
        return cls(bounds.int().to(device), int(bounds.diff().max()))


def _fa4(docs: Documents) -> Attend:
    function = importlib.import_module("flash_attn.cute.interface").flash_attn_varlen_func
    bounds = {
        "cu_seqlens_q": docs.cu_seqlens,
        "cu_seqlens_k": docs.cu_seqlens,
        "max_seqlen_q": docs.longest,
        "max_seqlen_k": docs.longest,
    }

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(q[0], k[0], v[0], causal=True, **bounds)
        return (out[0] if isinstance(out, tuple) else out)[None]

    return attend


def _flash_attn(docs: Documents) -> Attend:
    function = importlib.import_module("flash_attn.flash_attn_interface").flash_attn_varlen_func
    bounds = (docs.cu_seqlens, docs.cu_seqlens, docs.longest, docs.longest)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = function(q[0], k[0], v[0], *bounds, causal=True)
        return out[None]

    return attend


def _flash(docs: Documents) -> Attend:
    from torch.nn.attention.varlen import varlen_attn

    bounds = (docs.cu_seqlens, docs.cu_seqlens, docs.longest, docs.longest)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = varlen_attn(q[0], k[0], v[0], *bounds, window_size=(-1, 0))
        assert isinstance(out, Tensor)
        return out[None]

    return attend


VARLEN: dict[str, Callable[[Documents], Attend]] = {
    "fa4": _fa4,
    "flash_attn": _flash_attn,
    "flash": _flash,
}
"""The varlen attention of the package that is behind a backend, on one GPU."""


def zigzag_ring(docs: Documents, ranks: Ranks) -> Attend:
    """Return ring-flash-attn's zigzag ring, where each document is dealt to all ranks by itself.

    So a rank has as many tokens as ours, and others of them. Lengths must divide by 2 W.
    """
    module = load_module("zigzag_ring_flash_attn_varlen")
    size = ranks.world_size
    bounds = (docs.cu_seqlens // size, docs.longest // size)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = module.zigzag_ring_flash_attn_varlen_func(
            q[0], k[0], v[0], *bounds, causal=True, group=ranks.flat
        )
        return out[None]

    return attend


def llama3_ring(docs: Documents, ranks: Ranks) -> Attend:
    """Return ring-flash-attn's gathers by heads, half of the kv heads at once; contiguous runs."""
    module = load_module("llama3_flash_attn_varlen")
    *bounds, keys = module.llama3_flash_attn_prepare_cu_seqlens(
        docs.cu_seqlens, True, ranks.rank, ranks.world_size
    )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = module.llama3_flash_attn_varlen_func(
            q[0],
            k[0],
            v[0],
            *bounds,
            heads_k_stride=max(1, k.shape[2] // 2),
            local_k_slice=keys,
            causal=True,
            group=ranks.flat,
        )
        return out[None]

    return attend


RINGS: dict[str, Callable[[Documents, Ranks], Attend]] = {
    "zigzag ring": zigzag_ring,
    "llama3 ring": llama3_ring,
}
"""ring-flash-attn's two ways to share packed documents, over flash-attn 2."""
