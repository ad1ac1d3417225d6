"""A small decoder as users have one, with separate projections, so that heads can be cut."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

from lhcp.training.rope import rope_table, rotate

DIM, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCABULARY = 32, 4, 2, 8, 48, 61

MakeAttention = Callable[[int], nn.Module]
"""The index of a layer -> its attention."""


class Block(nn.Module):
    """One pre-norm layer; heads are counted from the width that a rank's projections have."""

    def __init__(self, attend: nn.Module) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.q = nn.Linear(DIM, HEADS * HEAD_DIM, bias=False)
        self.k = nn.Linear(DIM, KV_HEADS * HEAD_DIM, bias=False)
        self.v = nn.Linear(DIM, KV_HEADS * HEAD_DIM, bias=False)
        self.out = nn.Linear(HEADS * HEAD_DIM, DIM, bias=False)
        self.up = nn.Linear(DIM, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, DIM, bias=False)
        self.attend = attend

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, valid: Tensor | None = None) -> Tensor:
        y = self.attention_norm(x)
        q, k, v = (p(y).unflatten(-1, (-1, HEAD_DIM)) for p in (self.q, self.k, self.v))
        o = self.attend(rotate(q, cos, sin), rotate(k, cos, sin), v, valid=valid)
        x = x + self.out(o.flatten(-2))
        out: Tensor = x + self.down(F.silu(self.up(self.mlp_norm(x))))
        return out


class Llama(nn.Module):
    """Logits [B, n, V], or, with a loss, what that makes of the last hidden states and labels."""

    def __init__(self, attention: MakeAttention, num_layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, DIM)
        self.blocks = nn.ModuleList(Block(attention(i)) for i in range(num_layers))
        self.norm, self.head = nn.RMSNorm(DIM), nn.Linear(DIM, VOCABULARY, bias=False)
        self.recompute = False

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        x = self.embedding(tokens)
        cos, sin = (t.to(x.dtype) for t in rope_table(positions.flatten(), HEAD_DIM, 10000.0))
        for block in self.blocks:
            x = (
                checkpoint(block, x, cos, sin, valid, use_reentrant=False)
                if self.recompute
                else block(x, cos, sin, valid)
            )
        x = self.norm(x)
        return self.head(x) if loss is None else loss(x, self.head.weight)


def make(attention: MakeAttention, dtype: torch.dtype, num_layers: int = 2) -> Llama:
    """Draw a model, the same on every rank."""
    torch.manual_seed(0)
    return Llama(attention, num_layers).to(dtype)


def tensor_parallel_plan() -> dict[str, ParallelStyle]:
    """Cut heads and hidden width of a block."""
    cut, joined = ColwiseParallel(), RowwiseParallel()
    return dict.fromkeys(("q", "k", "v", "up"), cut) | dict.fromkeys(("out", "down"), joined)


def tensor_parallel(model: Llama, mesh: DeviceMesh) -> None:
    """Cut every block over the ranks of a mesh of one axis."""
    for block in model.blocks:
        parallelize_module(block, mesh, tensor_parallel_plan())
