"""Block calls of one rank's pass: by whole runs of chunks, or cut by documents."""

import torch
from torch import Tensor

from lhcp.ring.block import BLOCKS
from lhcp.ring.block.base import BackwardInputs, Grads
from lhcp.ring.documents import Cuts, PackedRows
from lhcp.ring.kv import KV
from lhcp.ring.plan import RingPlan
from lhcp.ring.schedule import Call, Step


class BlockCalls:
    """The plan's block, for calls of this rank.

    Args:
        plan: with the documents' limits, if there are documents.
    """

    def __init__(self, plan: RingPlan, packed: PackedRows | None) -> None:
        self._block, self._scale = BLOCKS[plan.backend], plan.scale
        self._chunk = plan.shape.chunk
        self._cuts: Cuts | None = None
        if packed is not None:
            self._cuts = Cuts.of(packed.numbers, plan.shape, plan.ranks.rank)

    def forward(self, q: Tensor, kv: KV, call: Call, step: Step) -> tuple[Tensor, Tensor]:
        """Attend as `Block.forward`, to keys as they were delivered."""
        if self._cuts is None:
            return self._block.forward(q, kv, call.mask, self._scale)
        assert self._block.packed is not None
        bounds = self._cuts.bounds(call, step)
        kv = kv.map(lambda x: self._put(x, _ascending(call, step)))
        return self._block.packed.forward(q, kv, call.mask, bounds, self._scale)

    def backward(self, inputs: BackwardInputs, call: Call, step: Step) -> Grads:
        """Compute gradients as `Block.backward`, of keys as they were delivered."""
        if self._cuts is None:
            return self._block.backward(inputs, call.mask, self._scale)
        assert self._block.packed is not None
        bounds, order = self._cuts.bounds(call, step), _ascending(call, step)
        inputs = inputs._replace(kv=inputs.kv.map(lambda x: self._put(x, order)))
        dq, *dkv = self._block.packed.backward(inputs, call.mask, bounds, self._scale)
        back = sorted(range(len(order)), key=order.__getitem__)
        dk, dv = (self._put(x, back) for x in dkv)
        return dq, dk, dv

    def _put(self, x: Tensor, order: list[int]) -> Tensor:
        """Put the chunks of [B, chunks n, heads, D] in an order; what is in order is not copied."""
        if order == sorted(order):
            return x
        size = self._chunk
        return torch.cat([x[:, i * size : (i + 1) * size] for i in order], 1)


def _ascending(call: Call, step: Step) -> list[int]:
    """Return the order in which a call's chunks of keys ascend, as documents need them."""
    keys = step.keys[slice(*call.kv)]
    return sorted(range(len(keys)), key=keys.__getitem__)
