"""One size of the layer on one GPU: its inputs, what is timed on them, and the limit."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import lhcp
from bench.common.turns import Arm, Spread, captured, interleaved, rotating
from lhcp.lighthouse.geometry import Geometry
from lhcp.lighthouse.kernel_set import QKV
from lhcp.lighthouse.kernel_sets import kernel_set
from lhcp.measure.clock import BEYOND_CACHE, Run, peak_gib
from lhcp.ring.block import BLOCKS
from lhcp.ring.block.base import BackwardInputs, Block
from lhcp.ring.kv import KV
from lhcp.ring.shape import CAUSAL

Runs = dict[str, Run]


@dataclass(frozen=True)
class Size:
    """B=1, L=3, p=4, k = N / 64, 16 strata: the sizes of the table. bf16."""

    seqlen: int
    num_heads: int = 8
    num_kv_heads: int = 8
    head_dim: int = 128
    backend: str = "cudnn"

    @property
    def config(self) -> lhcp.LighthouseConfig:
        return lhcp.LighthouseConfig(topk=self.seqlen // 64)

    @property
    def geom(self) -> Geometry:
        return Geometry.local(self.config, self.seqlen, 1, 1, 0)

    @property
    def subsequence(self) -> int:
        return self.geom.subsequence

    @property
    def block(self) -> Block:
        return BLOCKS[self.backend]

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's rows of q, k, v and o."""
        return 2 * (self.num_heads + self.num_kv_heads) * self.head_dim * 2

    @property
    def label(self) -> str:
        name = f"{self.seqlen // 1024}K"
        if (self.num_heads, self.num_kv_heads, self.head_dim) != (8, 8, 128):
            name += f" H={self.num_heads}/{self.num_kv_heads} d={self.head_dim}"
        return name

    def limit_ms(self, attention: float, directions: int, copy: float) -> float:
        """Add to the stock kernel at S what must move in each direction: q, k, v read once, the
        gathered triples written, attention's output read and o written, at a copy's rate."""
        moved = directions * self.token_bytes * (self.seqlen + self.subsequence)
        return attention + moved / copy * 1e3

    def draw(self, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw q, k, v and an output gradient; rows differ in size, so that selection has work."""

        def rows(heads: int) -> Tensor:
            shape = (1, length, heads, self.head_dim)
            x = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
            return x * (0.2 + 1.8 * torch.rand((*shape[:3], 1), device="cuda")).bfloat16()

        heads, kv_heads = self.num_heads, self.num_kv_heads
        return rows(heads), rows(kv_heads), rows(kv_heads), rows(heads)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> object:
        """Run the stock kernel, forward."""
        return self.block.forward(q, KV(k, v), CAUSAL, self.scale)

    def attend_both(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> object:
        """Run the stock kernel, forward and backward, without autograd around it."""
        kv = KV(k, v)
        out, lse = self.block.forward(q, kv, CAUSAL, self.scale)
        return self.block.backward(BackwardInputs(dout, q, kv, out, lse), CAUSAL, self.scale)

    def layer(self, q: Tensor, k: Tensor, v: Tensor, **choices: Any) -> Tensor:
        options: dict[str, Any] = {"backend": self.backend, "kernels": "triton"} | choices
        return lhcp.lighthouse_attention(q, k, v, config=self.config, **options)

    def layer_both(
        self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, **choices: Any
    ) -> tuple[Tensor, ...]:
        out = self.layer(q, k, v, **choices)
        return out, *torch.autograd.grad(out, (q, k, v), dout)


@dataclass(frozen=True)
class Measured:
    """One size's numbers. `times` in ms by arm: "attention f", "layer f+b graph", "dense f+b"."""

    size: Size
    times: dict[str, Spread]
    limit: dict[str, float]
    """ms, by "f" and "f+b"."""
    peak_gib: float
    """Forward + backward, beyond inputs, output and gradients."""

    def over_limit(self, arm: str) -> float:
        return self.times[arm].median / self.limit[arm.split()[1]]

    def speedup(self, arm: str) -> float | None:
        dense = self.times.get(f"dense {arm.split()[1]}")
        return dense.median / self.times[arm].median if dense else None


def layer_runs(size: Size, inputs: tuple[Tensor, ...], graphs: bool, **choices: Any) -> Runs:
    """Return the layer's forward and forward + backward, eager and replayed as CUDA graphs."""
    q, k, v, dout = inputs
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    runs: Runs = {
        "layer f": lambda: size.layer(q, k, v, **choices),
        "layer f+b": lambda: size.layer_both(q, k, v, dout, **choices),
    }
    return runs | ({f"{name} graph": captured(run) for name, run in runs.items()} if graphs else {})


def dense_rounds(seqlen: int) -> int:
    """Return the repeats of dense attention, which is quadratic: few where one takes seconds."""
    return 11 if seqlen <= 2**16 else max(2, 2**20 // seqlen)


def limit_sets(size: Size, inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """Gather the layer's own sub-sequence, in as many copies as do not fit into the cache together.

    Not random rows: the power that a product draws, and with it the clock, depends on the data.
    """
    local = kernel_set("triton")
    *qkv, dout = inputs
    tokens = QKV(*qkv)
    means, sq, sk = local.pool_and_score(tokens, size.geom, True, None)
    entries, rows = local.select(sq, sk, size.geom, None)
    sub = local.gather(tokens, means, entries, size.geom)
    do = local.scatter_backward(dout, entries, rows, size.geom, None)
    copies = -(-BEYOND_CACHE // (size.token_bytes * size.subsequence))
    return [tuple(x.clone() for x in (*sub, do)) for _ in range(copies)]


def measure(size: Size, copy: float, dense: bool, graphs: bool) -> Measured:
    """Time one size, everything interleaved; `copy` is bytes a second of a copy."""
    inputs = size.draw(size.seqlen)
    sets = limit_sets(size, inputs)
    arms = {
        "attention f": Arm(rotating(size.attend, sets)),
        "attention f+b": Arm(rotating(size.attend_both, sets)),
    }
    arms |= {name: Arm(run) for name, run in layer_runs(size, inputs, graphs).items()}
    if dense:
        rounds = dense_rounds(size.seqlen)
        arms["dense f"] = Arm(lambda: size.attend(*inputs), rounds)
        arms["dense f+b"] = Arm(lambda: size.attend_both(*inputs), rounds)
    times = interleaved(arms)
    limit = {
        "f": size.limit_ms(times["attention f"].median, 1, copy),
        "f+b": size.limit_ms(times["attention f+b"].median, 2, copy),
    }
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])

    def both() -> tuple[Tensor, ...]:
        return size.layer_both(q, k, v, inputs[3])

    both()
    torch.cuda.synchronize()
    known = torch.cuda.memory_allocated() + size.token_bytes * size.seqlen
    return Measured(size, times, limit, peak_gib(both, q.device) - known / 2**30)
