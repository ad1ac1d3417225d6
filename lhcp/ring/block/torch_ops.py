"""Block attention through torch's own operators that return lse: "cpu", "cudnn" and "flash".

The one file that knows their schemas, which change between torch versions; 2.11 to 2.15 have these.
An operator whose schema is not recognised is named in a warning at import, and its backend refuses.
"""

import warnings

import torch
from torch import Tensor

from lhcp.ring.block.base import BackwardInputs, Block, Grads
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
        names = " ".join(argument.name for argument in schema.arguments)
        if names != arguments or len(schema.returns) != num_results:
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


_HALF = (torch.bfloat16, torch.float16)

CPU = Block(
    name="cpu",
    forward=_cpu_forward,
    backward=_cpu_backward,
    devices=("cpu",),
    dtypes=(torch.float64, torch.float32, *_HALF),
    preference=10,
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
    missing=_missing(
        "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"
    ),
)
