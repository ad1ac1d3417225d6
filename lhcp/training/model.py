"""A byte-level Llama-style decoder whose attention is handed in: RMSNorm, RoPE, GQA, SwiGLU.

Shapes: B sequences, n tokens on this rank, H query heads, Hk kv heads, D head_dim, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from lhcp.config import LighthouseConfig
from lhcp.layer.mode import set_mode

AttentionFactory = Callable[[bool], nn.Module]
"""Is asked once a layer, "always dense?"; returns a module (q, k, v) -> o, all [B, n, heads, D],
which takes `cu_seqlens` where documents are packed."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The sizes of the decoder; the defaults are the paper's (arXiv 2605.06554), 268M parameters.

    Raises:
        ValueError: a size breaks a rule; the message names it and what fits.
    """

    dim: int = 1024
    """Width of the residual stream."""
    num_layers: int = 30
    num_heads: int = 8
    """H, query heads."""
    num_kv_heads: int = 8
    """Hk, key and value heads; divides num_heads."""
    head_dim: int = 128
    """D, width of one head; even, for RoPE."""
    hidden_dim: int = 1536
    """Width inside the SwiGLU."""
    dense_layers: tuple[int, ...] = (0, 1, 28, 29)
    """Layers that attend densely in both stages."""
    vocab_size: int = 256
    """V; 256 are the bytes."""
    rope_theta: float = 10000.0
    tied: bool = False
    """Whether the output head is the embedding's weight."""
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("dim", "num_layers", "num_heads", "num_kv_heads", "hidden_dim", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name, fits in (("rope_theta", 10000.0), ("norm_eps", 1e-5)):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name}={getattr(self, name)}: must be positive and finite, for example {fits}"
                )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim}: must be even, because RoPE turns pairs; for example 64"
            )
        if self.num_heads % self.num_kv_heads:
            divisors = [d for d in range(1, self.num_heads + 1) if self.num_heads % d == 0]
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads}: must divide num_heads={self.num_heads}, "
                f"for example one of {divisors}"
            )
        outside = [i for i in self.dense_layers if not 0 <= i < self.num_layers]
        if outside:
            raise ValueError(
                f"dense_layers={self.dense_layers}: {outside} are not layers; "
                f"num_layers={self.num_layers} has layers 0 to {self.num_layers - 1}"
            )


def rope_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return the RoPE factors (arXiv 2104.09864) that `rotate` takes, fp32.

    Args:
        positions: Global positions of this rank's tokens, int64 [n]; or [B, n].
        head_dim: D.
        theta: Base of the frequencies.

    Returns:
        cos [..., n, 1, 1, D / 2]; sin [..., n, 1, 2, D / 2], negative for the first half of a head.
    """
    # At a million tokens an fp32 angle is wrong by 0.06 rad, so the angles are float64.
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64) / head_dim
    angles = (positions.to(torch.float64)[..., None] * theta**-exponent)[..., None, None, :]
    sin = angles.sin()
    return angles.cos().float(), torch.cat((-sin, sin), dim=-2).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + D/2]) of x [B, n, heads, D] by the angles; keeps the dtype."""
    halves = torch.unflatten(x, -1, (2, -1))
    # The other half by its index and not by a cat: compiled, that is one pass over x.
    return (halves * cos + halves.flip(-2) * sin).flatten(-2).to(x.dtype)


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
        x = self.embedding(tokens)
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


def flops_per_token(
    config: ModelConfig, seqlen: int, lighthouse: LighthouseConfig | None = None
) -> float:
    """Estimate the FLOPs of forward and backward for one token.

    6 per weight of a matrix product, plus 6 * H * D * N per layer of causal attention over N
    tokens: 12 * H * D * N of arXiv 2204.02311, appendix B, halved because half the products are
    masked. A lighthouse layer attends over S entries instead: S * S / N in place of N.

    Args:
        config: Sizes.
        seqlen: N, tokens of the whole sequence.
        lighthouse: The lighthouse layers' config, or None where all layers are dense.
    """
    heads = config.num_heads * config.head_dim
    kv_heads = config.num_kv_heads * config.head_dim
    layer = config.dim * (2 * heads + 2 * kv_heads + 3 * config.hidden_dim)
    weights = config.num_layers * layer + config.dim * config.vocab_size
    sparse = 0 if lighthouse is None else config.num_layers - len(set(config.dense_layers))
    attended = float((config.num_layers - sparse) * seqlen)
    if lighthouse is not None:
        attended += sparse * lighthouse.subsequence_length(seqlen) ** 2 / seqlen
    return 6.0 * weights + 6.0 * heads * attended


@torch.no_grad()
def generate(
    model: Decoder,
    prompt: bytes,
    *,
    num_bytes: int,
    context: int,
    temperature: float = 0.7,
    seed: int = 0,
) -> bytes:
    """Continue `prompt` with a dense model on one rank, one byte at a time.

    Args:
        model: A decoder whose attention needs no other rank.
        prompt: Non-empty start of the text.
        num_bytes: How many bytes to add.
        context: The last bytes that the model sees at each step, at most what it was trained on.
        temperature: Divides the logits, > 0; small is greedy.
        seed: Draws the bytes.
    """
    if not prompt:
        raise ValueError("prompt=b'': must have at least one byte, for example b'\\n'")
    set_mode(model, "dense")
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    text = list(prompt)
    for _ in range(num_bytes):
        seen = torch.tensor([text[-context:]], device=device)
        logits = model(seen, torch.arange(seen.shape[1], device=device))[0, -1].float().cpu()
        weights = (logits / temperature).softmax(-1)
        text.append(int(torch.multinomial(weights, 1, generator=generator)))
    return bytes(text)
