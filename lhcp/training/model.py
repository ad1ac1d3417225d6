"""A byte-level Llama-style decoder whose attention is handed in: RMSNorm, RoPE, GQA, SwiGLU.

Shapes: B sequences, n tokens on this rank, H query heads, Hk kv heads, D head_dim, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from lhcp.training.model_config import ModelConfig
from lhcp.training.rope import rope_table, rotate

AttentionFactory = Callable[[bool], nn.Module]
"""Is asked once a layer, "always dense?"; returns a module (q, k, v) -> o, all [B, n, heads, D],
which takes `cu_seqlens` where documents are packed."""


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm whose result a compiled backward makes again from x and one scale per token.

    The kernels of that backward read x anyway, so this costs one write and keeps a sixth less
    memory in a block. Without torch.compile the products would keep the result all the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., dim] divided by its root mean square, times the weight."""
        if not (torch.compiler.is_compiling() and torch.is_grad_enabled()):
            return super().forward(x)
        assert self.eps is not None
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        product: Tensor = checkpoint(
            _scaled, x, scale, self.weight, use_reentrant=False, preserve_rng_state=False
        )
        return product


def _scaled(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    return (x.float() * scale * weight).to(x.dtype)


class Joined(nn.Linear):
    """Several products of one input as one; the weight's rows are theirs, one after another.

    Where `tensor_parallel.cut` has cut it, a rank has its part of each.
    """

    def __init__(self, dim: int, widths: Sequence[int]) -> None:
        super().__init__(dim, sum(widths), bias=False)
        self.widths, self.ways = tuple(widths), 1

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the products of x [..., dim], each [..., width / ways]."""
        y: Tensor = self(x)
        return y.split([width // self.ways for width in self.widths], dim=-1)

    def whole_rows(self) -> Tensor:
        """Return, int64 [sum(widths)], which row of the uncut weight each row of the cut one is."""
        rows = torch.arange(sum(self.widths)).split(self.widths)
        pieces = [part.chunk(self.ways) for part in rows]
        return torch.cat([part[rank] for rank in range(self.ways) for part in pieces])


class Attention(nn.Module):
    """The weights of one layer's attention, around the core that is handed in."""

    def __init__(self, config: ModelConfig, core: nn.Module) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width, kv_width = config.num_heads * self.head_dim, config.num_kv_heads * self.head_dim
        # q and k in one product, because RoPE takes both on to new memory. With v in it too, a
        # backward that keeps v would keep q and k from before RoPE alive.
        self.qk = Joined(config.dim, (width, kv_width))
        self.v = nn.Linear(config.dim, kv_width, bias=False)
        self.out = nn.Linear(width, config.dim, bias=False)
        self.core = core

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q [B, n, H, D], k and v [B, n, Hk, D] of x [B, n, dim]; of cut heads, its own."""
        parts = (*self.qk.parts(x), self.v(x))
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        return rotate(q, cos, sin), rotate(k, cos, sin), v


class SwiGLU(nn.Module):
    """The MLP down(silu(gate(x)) * up(x)), arXiv 2002.05202; gate and up are one product."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_up = Joined(dim, (hidden_dim, hidden_dim))
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for x [..., dim], same shape."""
        gate, up = self.gate_up.parts(x)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


class DecoderLayer(nn.Module):
    """One pre-norm layer of the decoder."""

    def __init__(self, config: ModelConfig, core: nn.Module, *, always_dense: bool) -> None:
        super().__init__()
        self.always_dense = always_dense
        self.attention_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config, core)
        self.mlp_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = SwiGLU(config.dim, config.hidden_dim)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Return x [B, n, dim] after this layer."""
        # Here and not in a module of its own: where the core is a CUDA graph, torch.compile ends a
        # graph of its own at it, and another one in each module around it.
        q, k, v = self.attention.qkv(self.attention_norm(x), cos, sin)
        core = self.attention.core
        o = core(q, k, v) if cu_seqlens is None else core(q, k, v, cu_seqlens=cu_seqlens)
        x = x + self.attention.out(o.flatten(-2))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class Decoder(nn.Module):
    """The decoder on this rank's tokens; only the attention that is handed in sees other ranks.

    Args:
        config: Sizes.
        attention: Makes the attention of a layer; see `AttentionFactory`.
        recompute: Whether the backward recomputes each layer instead of keeping its activations.
        offload: Whether what is recomputed from, the input of each layer, waits in the host's
            memory meanwhile.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention: AttentionFactory,
        *,
        recompute: bool = False,
        offload: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.recompute, self.offload = recompute, offload
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(
            DecoderLayer(config, attention(dense), always_dense=dense)
            for dense in (i in config.dense_layers for i in range(config.num_layers))
        )
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight

    def forward(
        self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Return logits [B, n, V] of the byte after each token.

        Args:
            tokens: int64 [B, n], this rank's tokens in layout order.
            positions: int64 [n], where they are in the whole sequence; or [B, n].
            cu_seqlens: documents that the whole sequences are packed of; None: each is one.
        """
        cos, sin = rope_table(positions, self.config.head_dim, self.config.rope_theta)
        x = self._embed(tokens)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                layer = partial(block, cos=cos, sin=sin, cu_seqlens=cu_seqlens)
                with save_on_cpu(pin_memory=True) if self.offload else nullcontext():
                    # What the function holds, which all layers share, stays where it is.
                    x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = block(x, cos, sin, cu_seqlens)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def _embed(self, tokens: Tensor) -> Tensor:
        weight = self.embedding.weight
        if weight.device.type != "cpu":
            return self.embedding(tokens)
        # On a CPU torch adds up the gradient of a row in its dtype: thousands of tokens of one byte
        # lose half of it in bfloat16.
        wide = torch.promote_types(weight.dtype, torch.float32)
        return F.embedding(tokens, weight.to(wide)).to(weight.dtype)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Draw all weights from `seed`: normal of deviation 0.02, layer outputs by depth, norms 1.

        The draw is over the whole model on one device, so it is the same on every mesh.
        """
        generator = torch.Generator(self.embedding.weight.device).manual_seed(seed)
        by_depth = 0.02 / (2 * self.config.num_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                deviation = by_depth if name.endswith(("out.weight", "down.weight")) else 0.02
                parameter.normal_(0.0, deviation, generator=generator)


def num_parameters(model: nn.Module) -> int:
    """Count the parameters; a shared one counts once, a sharded one whole."""
    return sum(parameter.numel() for parameter in model.parameters())
