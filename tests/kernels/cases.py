"""Shapes, inputs and verdicts shared by the kernel tests."""

import random
from dataclasses import dataclass

import torch

from lhcp.lighthouse.geometry import Geometry
from lhcp.lighthouse.kernel_set import QKV

INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"


@dataclass(frozen=True)
class KernelCase:
    """A geometry and the shape of its tensors."""

    num_levels: int
    pool_factor: int
    picks: int
    stratum_coarsest: int
    num_strata: int = 2
    num_chunks: int = 1
    has_first: bool = True
    batch: int = 1
    num_heads: int = 2
    num_kv_heads: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.bfloat16

    @property
    def geom(self) -> Geometry:
        window = self.pool_factor ** (self.num_levels - 1)
        return Geometry(
            num_tokens=self.num_strata * self.stratum_coarsest * window,
            num_strata=self.num_strata,
            num_chunks=self.num_chunks,
            num_levels=self.num_levels,
            pool_factor=self.pool_factor,
            picks=self.picks,
            has_first=self.has_first,
        )

    def rows(self, length: int, num_heads: int) -> torch.Tensor:
        """Random [B, length, heads, D]."""
        shape = (self.batch, length, num_heads, self.head_dim)
        return torch.randn(shape, device=DEVICE).to(self.dtype)

    def qkv(self, length: int) -> QKV:
        """Random q, k, v of so many rows."""
        kv = self.num_kv_heads
        return QKV(*(self.rows(length, num) for num in (self.num_heads, kv, kv)))

    def scores(self, kind: str = "random") -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of levels 1 to L-1 with what breaks a selection: ties, inf, NaN."""
        shape = (self.batch, self.num_kv_heads, self.geom.pooled_size)
        sq, sk = torch.rand(shape, device=DEVICE), torch.rand(shape, device=DEVICE)
        if kind == "equal":
            sq, sk = torch.full_like(sq, 2.0), torch.full_like(sk, 2.0)
        elif kind == "ties":
            sq, sk = (sq * 4).round(), (sk * 4).round()
        elif kind == "signed":
            sq, sk = (sq * 4).round() - 2, -sk
        elif kind == "special":
            for score in (sq, sk):
                score[torch.rand(shape, device=DEVICE) < 0.2] = torch.inf
                score[torch.rand(shape, device=DEVICE) < 0.1] = torch.nan
                score[torch.rand(shape, device=DEVICE) < 0.1] = -torch.inf
        return sq, sk

    def selection(self, positions: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Both maps of a selection by random scores, by the torch path."""
        from lhcp.lighthouse.select import select

        return tuple(select(*self.scores("ties"), self.geom, positions))

    def positions(self, seed: int, begins: float = 0.1) -> torch.Tensor:
        """Of tokens inside documents, of which one begins with this chance at each token.

        The first of a chunk may lie inside of one, near its beginning or far from it.
        """
        draw = random.Random(seed)
        rows = []
        for _ in range(self.batch):
            row: list[int] = []
            for _ in range(self.geom.num_chunks):
                position = draw.choice([0, 1, 3, 1000])
                for _ in range(self.geom.chunk_size):
                    row.append(position)
                    position = 0 if draw.random() < begins else position + 1
            rows.append(row)
        return torch.tensor(rows, dtype=torch.int32, device=DEVICE)


CASES = {
    "p4": KernelCase(3, 4, 2, 2, batch=2, num_heads=2, num_kv_heads=1),
    "two_chunks": KernelCase(3, 4, 2, 2, num_chunks=2, num_heads=2, num_kv_heads=1, head_dim=128),
    "p2_deep": KernelCase(
        4, 2, 4, 5, num_chunks=2, num_heads=1, num_kv_heads=1, head_dim=96, has_first=False
    ),
    "p8": KernelCase(2, 8, 2, 3, num_strata=1, num_kv_heads=1, head_dim=128, dtype=torch.float16),
    "all_taken": KernelCase(3, 2, 6, 6, head_dim=64, num_heads=3, num_kv_heads=1),
    "fp32": KernelCase(3, 4, 2, 2, num_chunks=2, head_dim=40, dtype=torch.float32),
    "wide": KernelCase(2, 2, 2, 6, head_dim=256, num_heads=1, num_kv_heads=1),
    "p3": KernelCase(3, 3, 2, 3, num_chunks=2, num_heads=4, num_kv_heads=2, head_dim=16),
}

STRIDED = ["two_chunks", "fp32", "wide"]
"""Cases that also run on views: vector, odd and full rows. The interpreter is slow."""


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values in a view of a wider buffer, as a slice of a fused projection is."""
    wide = torch.full((*x.shape[:2], 3, *x.shape[2:]), torch.nan, dtype=x.dtype, device=x.device)
    wide[:, :, 1] = x
    return wide[:, :, 1]


def assert_close(got: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """Assert one rounding to `dtype` and fp32 sums: got against a float64 oracle."""
    assert got.shape == exact.shape
    assert torch.isfinite(got).all()
    error = (got.double() - exact).abs()
    # The interpreter cuts fp32 to bf16 where a GPU rounds to nearest.
    ulps = 1.01 if INTERPRETED and dtype == torch.bfloat16 else 0.51
    band = torch.finfo(dtype).eps * exact.abs() * ulps + 2e-6 * exact.abs().max() + 1e-30
    assert (error <= band).all(), f"largest error over its band: {(error / band).max():.3g}"
