"""Lighthouse attention at a few positions of a long sequence, by its formula, on one process.

A position's output and gradients are a few rows and columns of the S x S attention, given the lse
of every row. One pass over blocks of rows finds those, so that no N x N or S x S tensor is made.
Plain torch on top of lhcp/reference.py, in the dtype of the inputs; nothing of the library.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lhcp import reference
from lhcp.config import LighthouseConfig


class SampledRows(NamedTuple):
    """Output and gradients at the positions."""

    out: Tensor
    """[samples, H, D], as dq; dk, dv are [samples, Hk, D]."""
    dq: Tensor
    dk: Tensor
    dv: Tensor


def at_positions(
    inputs: tuple[Tensor, ...],
    config: LighthouseConfig,
    selection: reference.ReferenceSelection,
    positions: Tensor,
    block: int = 512,
) -> tuple[SampledRows, float]:
    """Compute the layer and its gradients at `positions`.

    Args:
        inputs: q [1, N, H, D], k, v [1, N, Hk, D], dout like q.
        positions: [samples] int64.
        block: rows of the attention that are computed at a time.

    Returns:
        the rows, and the largest |lse| of the sub-sequence.

    Raises:
        ValueError: more than one sequence.
    """
    q, k, v, dout = inputs
    if q.shape[0] != 1:
        raise ValueError(f"a batch of {q.shape[0]}: must be one sequence")
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    gathered = [reference.gather(x, selection, config)[0] for x in (q, k, v)]
    rows, largest = [], 0.0
    for head in range(num_heads):
        kv_head = head * num_kv_heads // num_heads
        places = Places(selection, kv_head, q.shape[1], config)
        qs, ks, vs = (x[:, h] for x, h in zip(gathered, (head, kv_head, kv_head), strict=True))
        attention = HeadAttention(qs, ks, vs, places.owed(dout[0, :, head]), block)
        rows.append(_rows(attention, places, positions))
        largest = max(largest, attention.lse.abs().max().item())
    out, dq, dk, dv = (torch.stack(x, 1) for x in zip(*rows, strict=True))
    dk, dv = (x.unflatten(1, (num_kv_heads, -1)).sum(2) for x in (dk, dv))
    return SampledRows(out, dq, dk, dv), largest


class Places:
    """Where each entry of each level stands in the sub-sequence of one kv head, or -1."""

    def __init__(
        self,
        selection: reference.ReferenceSelection,
        kv_head: int,
        seqlen: int,
        config: LighthouseConfig,
    ) -> None:
        self._levels, self._indices = (x[0, kv_head] for x in selection)
        self.windows = [config.pool_factor**level for level in range(config.num_levels)]
        self.of = []
        for level, window in enumerate(self.windows):
            at = (self._levels == level).nonzero()[:, 0]
            nowhere = at.new_full((seqlen // window,), -1)
            self.of.append(nowhere.index_copy(0, self._indices[at], at))

    def owed(self, dout: Tensor) -> Tensor:
        """Return each entry's output gradient: dout [N, D] summed over the positions it serves."""
        grads = dout.new_empty(self._levels.shape[0], dout.shape[1])
        for level, window in enumerate(self.windows):
            # Entry i serves the positions from its last token on, as many as it covers.
            served = torch.cat([dout[window - 1 :], dout.new_zeros(window - 1, dout.shape[1])])
            at = self._levels == level
            grads[at] = served.unflatten(0, (-1, window)).sum(1)[self._indices[at]]
        return grads


class HeadAttention:
    """Causal attention over one head's sub-sequence: q, k, v and the output's gradient [S, D]."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, do: Tensor, block: int) -> None:
        self.q, self.k, self.v, self.do = q, k, v, do
        self.scale = q.shape[1] ** -0.5
        self.out, self.lse = torch.empty_like(q), q.new_empty(q.shape[0])
        for start in range(0, q.shape[0], block):
            stop = min(start + block, q.shape[0])
            logits = q[start:stop] @ k[:stop].T * self.scale
            future = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)
            logits[:, start:].masked_fill_(future, -torch.inf)
            lse = logits.logsumexp(1)
            self.lse[start:stop] = lse
            self.out[start:stop] = logits.sub_(lse[:, None]).exp_() @ v[:stop]
        self.delta = (self.out * do).sum(1)

    def query_grad(self, at: Tensor) -> Tensor:
        """Return dq of the entries at places `at`: their rows of the attention."""
        future = torch.arange(self.k.shape[0]) > at[:, None]
        weights = self._weights(self.q[at], self.k, self.lse[at][:, None], future)
        grads = weights * (self.do[at] @ self.v.T - self.delta[at][:, None])
        return grads @ self.k * self.scale

    def key_value_grads(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Return dk, dv of the entries at places `at`: their columns of the attention."""
        past = torch.arange(self.q.shape[0])[:, None] < at
        weights = self._weights(self.q, self.k[at], self.lse[:, None], past)
        grads = weights * (self.do @ self.v[at].T - self.delta[:, None])
        return grads.T @ self.q * self.scale, weights.T @ self.do

    def _weights(self, q: Tensor, k: Tensor, lse: Tensor, masked: Tensor) -> Tensor:
        return (q @ k.T * self.scale - lse).exp_().masked_fill_(masked, 0)


def _rows(attention: HeadAttention, places: Places, positions: Tensor) -> list[Tensor]:
    """Return out, dq, dk, dv of one head, each [samples, D]."""
    out, dq, dk, dv = (attention.q.new_zeros(len(positions), attention.q.shape[1]) for _ in "oqkv")
    for window, of in zip(places.windows, places.of, strict=True):
        # The entry of this level whose last token is the latest one not after the position.
        serving = (positions + 1) // window - 1
        at = of[serving.clamp(min=0)].masked_fill(serving < 0, -1)
        out[at >= 0] += attention.out[at[at >= 0]]
        # The entry that covers the position has its mean's gradient.
        at = of[positions // window]
        covered = at >= 0
        dq[covered] += attention.query_grad(at[covered]) / window
        grads = attention.key_value_grads(at[covered])
        dk[covered] += grads[0] / window
        dv[covered] += grads[1] / window
    return [out, dq, dk, dv]
