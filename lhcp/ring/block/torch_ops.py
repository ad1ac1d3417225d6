"""Block attention through torch's own operators that return lse: "cpu", "cudnn" and "flash".

The one file that knows their schemas, which change between torch versions; 2.11 to 2.15 have these,
some with more optional arguments behind.
An operator whose schema is not recognised is named in a warning at import, and its backend refuses.
"""

import itertools
import warnings

import torch
from torch import Tensor

from lhcp.precision import wide
from lhcp.ring.block.base import BackwardInputs, Block, Bounds, Grads
from lhcp.ring.block.packed import Varlen, checked_lse, packed_calls, without_keys
from lhcp.ring.kv import KV
from lhcp.ring.shape import Mask

_aten = torch.ops.aten

# Argument names up to the keyword-only ones, then the number of results: what the calls below use.
_KNOWN = {
    "_scaled_dot_product_flash_attention_for_cpu": (
        "query key value dropout_p is_causal attn_mask scale",
        2,
    ),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (
        "grad_out query key value out logsumexp dropout_p is_causal attn_mask scale",
        3,
    ),
    "_scaled_dot_product_cudnn_attention": (
        "query key value attn_bias compute_log_sumexp dropout_p is_causal return_debug_mask scale",
        9,
    ),
    "_scaled_dot_product_cudnn_attention_backward": (
        "grad_out query key value out logsumexp philox_seed philox_offset attn_bias cum_seq_q "
        "cum_seq_k max_q max_k dropout_p is_causal scale",
        3,
    ),
    "_scaled_dot_product_flash_attention": (
        "query key value dropout_p is_causal return_debug_mask scale",
        9,
    ),
    "_scaled_dot_product_flash_attention_backward": (
        "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p "
        "is_causal philox_seed philox_offset scale",
        3,
    ),
    "_flash_attention_forward": (
        "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask "
        "scale",
        5,
    ),
    "_flash_attention_backward": (
        "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p "
        "is_causal rng_state unused scale",
        3,
    ),
}


def unrecognised_schemas() -> dict[str, str]:
    """Return {operator: what differs} for every operator whose schema is not the known one."""
    found = {}
    for name, (arguments, num_results) in _KNOWN.items():
        packet = getattr(_aten, name, None)
        if packet is None:
            found[name] = "torch has no such operator"
            continue
        schema = packet.default._schema
        known = arguments.split()
        names = [argument.name for argument in schema.arguments[: len(known)]]
        needed = any(not more.has_default_value() for more in schema.arguments[len(known) :])
        if names != known or needed or len(schema.returns) != num_results:
            found[name] = f"torch {torch.__version__} declares {schema}"
    return found


_UNRECOGNISED = unrecognised_schemas()
for _name, _what in _UNRECOGNISED.items():
    warnings.warn(f"lhcp does not recognise aten::{_name}: {_what}", stacklevel=2)


def _missing(*operators: str) -> str | None:
    bad = [name for name in operators if name in _UNRECOGNISED]
    if not bad:
        return None
    return f"aten::{bad[0]} is not the operator that lhcp knows: {_UNRECOGNISED[bad[0]]}"


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """View [B, S, H, D] as [B, H, S, D]."""
    return tuple(x.transpose(1, 2) for x in tensors)


def _heads_last(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2) for x in tensors)


def _cpu_forward(q: Tensor, kv: KV, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        *_heads_first(q, *kv), 0.0, mask.causal, scale=scale
    )
    return out.transpose(1, 2), lse


def _cpu_backward(inputs: BackwardInputs, mask: Mask, scale: float) -> Grads:
    dout, q, (k, v), out, lse = inputs
    grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *_heads_first(dout, q, k, v, out), lse, 0.0, mask.causal, scale=scale
    )
    dq, dk, dv = _heads_last(*grads)
    return dq, dk, dv


def _runs(bounds: Bounds) -> list[tuple[slice, slice]]:
    """Return the runs of queries and of keys of which neither is empty; bounds are on the CPU."""
    of_q, of_kv = (
        [slice(*edge) for edge in itertools.pairwise(edges.tolist())]
        for edges in (bounds.q, bounds.kv)
    )
    pairs = zip(of_q, of_kv, strict=True)
    return [(q, kv) for q, kv in pairs if q.start < q.stop and kv.start < kv.stop]


def _cpu_varlen_forward(
    q: Tensor, kv: KV, mask: Mask, bounds: Bounds, scale: float
) -> tuple[Tensor, Tensor]:
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=wide(q.dtype))
    for rows, keys in _runs(bounds):
        of_run = KV(*(x[None, keys] for x in kv))
        results = _cpu_forward(q[None, rows], of_run, mask, scale)
        out[rows], lse[:, rows] = results[0][0], results[1][0]
    return out, lse


def _cpu_varlen_backward(inputs: BackwardInputs, mask: Mask, bounds: Bounds, scale: float) -> Grads:
    dout, q, kv, out, lse = inputs
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, *kv))
    for rows, keys in _runs(bounds):
        of_run = BackwardInputs(
            dout[None, rows],
            q[None, rows],
            KV(*(x[None, keys] for x in kv)),
            out[None, rows],
            lse[None, :, rows].contiguous(),
        )
        of_q, of_k, of_v = _cpu_backward(of_run, mask, scale)
        dq[rows], dk[keys], dv[keys] = of_q[0], of_k[0], of_v[0]
    return dq, dk, dv


def _cudnn_forward(q: Tensor, kv: KV, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
        *_heads_first(q, *kv), None, True, 0.0, mask.causal, False, scale=scale
    )
    # [B, H, S, 1] since torch 2.9.
    return out.transpose(1, 2), lse.view(lse.shape[:3])


def _cudnn_backward(inputs: BackwardInputs, mask: Mask, scale: float) -> Grads:
    dout, q, (k, v), out, lse = inputs
    unused = q.new_empty((), dtype=torch.int64)  # the dropout's state; there is no dropout
    grads = _aten._scaled_dot_product_cudnn_attention_backward(
        *_heads_first(dout, q, k, v, out),
        lse.contiguous()[..., None],
        unused,
        unused,
        None,
        None,
        None,
        q.shape[1],
        k.shape[1],
        0.0,
        mask.causal,
        scale=scale,
    )
    dq, dk, dv = _heads_last(*grads)
    return dq, dk, dv


def _flash_forward(q: Tensor, kv: KV, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _aten._scaled_dot_product_flash_attention(
        *_heads_first(q, *kv), 0.0, mask.causal, False, scale=scale
    )
    return out.transpose(1, 2), lse


def _flash_backward(inputs: BackwardInputs, mask: Mask, scale: float) -> Grads:
    dout, q, (k, v), out, lse = inputs
    unused = q.new_empty((), dtype=torch.int64)  # the dropout's state; there is no dropout
    grads = _aten._scaled_dot_product_flash_attention_backward(
        *_heads_first(dout, q, k, v, out),
        lse.contiguous(),
        None,
        None,
        q.shape[1],
        k.shape[1],
        0.0,
        mask.causal,
        unused,
        unused,
        scale=scale,
    )
    dq, dk, dv = _heads_last(*grads)
    return dq, dk, dv


def _lengths(bounds: Bounds) -> tuple[int, int]:
    """Return the longest runs as the kernel is told; at most one query means "decode" to it."""
    return max(bounds.longest_q, 2), max(bounds.longest_kv, 2)


def _flash_varlen_forward(
    q: Tensor, kv: KV, mask: Mask, bounds: Bounds, scale: float
) -> tuple[Tensor, Tensor]:
    lengths = _lengths(bounds)
    out, lse, *_ = _aten._flash_attention_forward(
        q, *kv, bounds.q, bounds.kv, *lengths, 0.0, mask.causal, False, scale=scale
    )
    source = "aten::_flash_attention_forward"
    if bounds.all_meet:
        return out, checked_lse(lse, q, source)
    return out, without_keys(lse, q, source)


def _flash_varlen_backward(
    inputs: BackwardInputs, mask: Mask, bounds: Bounds, scale: float
) -> Grads:
    dout, q, (k, v), out, lse = inputs
    unused = q.new_empty((), dtype=torch.int64)  # the dropout's state; there is no dropout
    dq, dk, dv = _aten._flash_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        bounds.q,
        bounds.kv,
        *_lengths(bounds),
        0.0,
        mask.causal,
        unused,
        unused,
        scale=scale,
    )
    return dq, dk, dv


_HALF = (torch.bfloat16, torch.float16)

CPU = Block(
    name="cpu",
    forward=_cpu_forward,
    backward=_cpu_backward,
    devices=("cpu",),
    dtypes=(torch.float64, torch.float32, *_HALF),
    preference=10,
    packed=packed_calls(Varlen(_cpu_varlen_forward, _cpu_varlen_backward)),
    missing=_missing(
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
)

CUDNN = Block(
    name="cudnn",
    forward=_cudnn_forward,
    backward=_cudnn_backward,
    devices=("cuda",),
    dtypes=_HALF,
    preference=20,
    max_head_dim=128,
    head_dim_multiple=8,
    can_be_deterministic=False,
    missing=_missing(
        "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward"
    ),
)

FLASH = Block(
    name="flash",
    forward=_flash_forward,
    backward=_flash_backward,
    devices=("cuda",),
    dtypes=_HALF,
    preference=40,
    max_head_dim=256,
    head_dim_multiple=8,
    packed=None
    if _missing("_flash_attention_forward", "_flash_attention_backward")
    else packed_calls(Varlen(_flash_varlen_forward, _flash_varlen_backward)),
    missing=_missing(
        "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"
    ),
)
