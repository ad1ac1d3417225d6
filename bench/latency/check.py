"""The gate of one size: what must hold before a number is printed for it."""

from functools import cache

import torch
from torch import Tensor

import lhcp
from bench.common.problem import TENSORS
from bench.latency.size import Size
from bench.latency.stages import Wrong, assert_near
from lhcp import reference
from lhcp.comm.mesh import Ranks
from lhcp.layer.select import local_geometry
from lhcp.lighthouse import operators
from lhcp.operators import pack_integers
from lhcp.ring.block.base import BackwardInputs
from lhcp.ring.kv import KV
from lhcp.ring.shape import CAUSAL
from lhcp.testing.tolerance import assert_within_budget

SMALL = 2048
"""Tokens at which the whole layer is compared with the reference in float64."""

_ROWS = 48


def check(size: Size) -> None:
    """Check the layer of one size, forward and backward.

    At a small N against the reference; at this N, the local stages against the torch path on the
    same selection, and the attention against float64 on sampled rows.

    Raises:
        Wrong: something differs; the message says what.
    """
    try:
        _check_reference(
            Size(SMALL, size.num_heads, size.num_kv_heads, size.head_dim, size.backend)
        )
    except AssertionError as error:
        raise Wrong(f"at N={SMALL} {error}") from error
    inputs = size.draw(size.seqlen)
    q, k, v = (x.requires_grad_() for x in inputs[:3])
    selection = lhcp.select(q, k, config=size.config, kernels="triton")
    ours = size.layer_both(q, k, v, inputs[3])
    for name, a, b in zip(
        TENSORS,
        ours,
        size.layer_both(q, k, v, inputs[3], selection=selection, kernels="torch"),
        strict=True,
    ):
        if name == "out":
            assert_near(name, a, b)
        # The attention's backward may sum in any order, so its gradients are close, not equal.
        elif not _distance(a, b) < 5e-3:
            raise Wrong(f"{name}: {_distance(a, b):.1e} from the torch path's")
    del ours, a, b
    sizes = pack_integers(local_geometry(size.config, size.seqlen, Ranks(), "zigzag"))
    with torch.no_grad():
        *means, _, _ = operators.pool_and_score(q, k, v, sizes, True, "triton")
        tokens, entries = [q, k, v], selection.entries
        sub = operators.gather_subsequence(tokens, means, entries, sizes, "triton")
    _check_attention(size, *sub)


def _distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).float().norm() / b.float().norm()).item()


@cache
def _check_reference(size: Size) -> None:
    q, k, v, dout = size.draw(size.seqlen)
    selection = lhcp.select(q, k, config=size.config, kernels="triton")
    levels, indices = selection.levels(size.geom), selection.indices(size.geom)
    fixed = reference.ReferenceSelection(levels, indices)

    def by_reference(dtype: torch.dtype) -> tuple[Tensor, ...]:
        rows = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = reference.lighthouse_attention(*rows, config=size.config, selection=fixed)
        return out, *torch.autograd.grad(out, rows, dout.to(dtype))

    q, k, v = (x.requires_grad_() for x in (q, k, v))
    ours = size.layer_both(q, k, v, dout)
    plain, exact = by_reference(q.dtype), by_reference(torch.float64)
    for results in zip(TENSORS, ours, plain, exact, strict=True):
        assert_within_budget(*results)


def _check_attention(size: Size, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check sampled rows of out, dq, dk and dv of the stock kernel against float64."""
    dout = torch.randn_like(q)
    kv = KV(k, v)
    out, lse = size.block.forward(q, kv, CAUSAL, size.scale)
    grads = size.block.backward(BackwardInputs(dout, q, kv, out, lse), CAUSAL, size.scale)
    delta = (dout.double() * out.double()).sum(-1)
    at = torch.randint(size.subsequence, (_ROWS,), device=q.device).sort().values
    everywhere = torch.arange(size.subsequence, device=q.device)
    sampled_sees, sees_sampled = at[:, None] >= everywhere, everywhere[:, None] >= at
    groups = size.num_heads // size.num_kv_heads
    found: dict[str, list[Tensor]] = {name: [] for name in TENSORS}
    for head in range(size.num_kv_heads):
        rows = slice(head * groups, (head + 1) * groups)
        keys, values = k[0, :, head].double(), v[0, :, head].double()
        dk, dv = (torch.zeros_like(keys[at]) for _ in range(2))
        for h in range(rows.start, rows.stop):
            queries, grad = q[0, :, h].double(), dout[0, :, h].double()
            logits = queries[at] @ keys.T * size.scale
            logits = logits.masked_fill(~sampled_sees, -torch.inf)
            weights = logits.softmax(-1)
            found["out"].append(weights @ values)
            dlogits = weights * (grad[at] @ values.T - delta[0, at, h, None]) * size.scale
            found["dq"].append(dlogits @ keys)
            logits = queries @ keys[at].T * size.scale
            weights = (logits - lse[0, h, :, None]).exp() * sees_sampled
            dv += weights.T @ grad
            dk += (weights * (grad @ values[at].T - delta[0, :, h, None])).T @ queries * size.scale
        found["dk"].append(dk)
        found["dv"].append(dv)
    for name, got in zip(found, (out, *grads), strict=True):
        far = _distance(got[0, at].double(), torch.stack(found[name], 1))
        if not far < 1e-2:
            raise Wrong(f"attention's {name}: {far:.1e} from float64 on {_ROWS} rows")
