"""The sizes of the decoder."""

import math
from dataclasses import dataclass


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
