"""Each local stage of the layer: its launcher, its bytes, its check against the torch path.

A stage whose output is wrong has no time.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bench.common.turns import Spread
from lhcp.lighthouse import gather as torch_gather
from lhcp.lighthouse import norms
from lhcp.lighthouse import pool as torch_pool
from lhcp.lighthouse import scatter as torch_scatter
from lhcp.lighthouse import select as torch_select
from lhcp.lighthouse.geometry import Geometry
from lhcp.lighthouse.kernel_set import QKV, Pooled
from lhcp.lighthouse.kernels import gather, pool, scatter, scatter_backward, select
from lhcp.measure.clock import Run, kernel_seconds

Tensors = tuple[Tensor, ...]


class Shape(NamedTuple):
    """Heads and rows of one problem."""

    num_heads: int = 8
    num_kv_heads: int = 8
    head_dim: int = 128
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"

    def rows(self, length: int, heads: int) -> Tensor:
        shape = (self.batch, length, heads, self.head_dim)
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def qkv(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        kv = self.num_kv_heads
        return self.rows(length, self.num_heads), self.rows(length, kv), self.rows(length, kv)


@dataclass(frozen=True)
class TimedStage:
    """One launcher, the bytes that it must move and what the torch path returns in its place."""

    run: Run
    num_bytes: int
    want: Callable[[], Iterable[Tensor]]
    exact: bool = False
    """Bit for bit, and not up to one unit in the last place."""
    got: Callable[[], Tensors] | None = None
    """What is held against the torch path, where `run` writes in place."""

    def check(self, name: str) -> None:
        """Compare with the torch path.

        Raises:
            Wrong: they differ.
        """
        pairs = zip(tensors((self.got or self.run)()), self.want(), strict=True)
        for got, want in pairs:
            (assert_equal if self.exact else assert_near)(name, got, want)


class Wrong(AssertionError):
    """An output differs from its reference: no number may be printed for it."""


class Timed(NamedTuple):
    """One stage's kernels."""

    ms: Spread
    of_copy: float
    """The rate at which it moves what it must, over a copy's."""


def assert_near(name: str, got: Tensor, want: Tensor) -> None:
    """Check equality up to one unit in the last place of the dtype.

    Raises:
        Wrong: they differ.
    """
    ulp = 1.01 * max(torch.finfo(got.dtype).eps, 1e-5)
    same = got.shape == want.shape and got.dtype == want.dtype
    # In parts: the comparison's own buffers are several times its inputs.
    parts = zip(got.split(2**16, 1), want.split(2**16, 1), strict=True) if same else []
    if not same or not all(torch.allclose(a, b, rtol=ulp, atol=1e-5) for a, b in parts):
        raise Wrong(f"{name} is not the torch path's")


def assert_equal(name: str, got: Tensor, want: Tensor) -> None:
    """Check equality bit for bit.

    Raises:
        Wrong: they differ.
    """
    if not torch.equal(got, want):
        raise Wrong(f"{name} is not the torch path's, bit for bit")


def build(geom: Geometry, shape: Shape) -> dict[str, TimedStage]:
    """Build the stages of one size on random inputs."""
    heads, kv_heads = shape.num_heads, shape.num_kv_heads
    n, sub, pooled = geom.num_tokens, geom.subsequence, geom.pooled_size
    row = shape.batch * shape.head_dim * shape.dtype.itemsize
    triple = row * (heads + 2 * kv_heads)
    indices = 4 * shape.batch * kv_heads
    tokens, grads = QKV(*shape.qkv(n)), QKV(*shape.qkv(sub))
    means, sq, sk = pool.pool_and_score(tokens, geom)
    entries, rows = select.select(sq, sk, geom)
    o, dout = shape.rows(sub, heads), shape.rows(n, heads)
    out = scatter.scatter(o, rows, geom)
    halo = shape.rows(geom.num_chunks * (geom.num_levels - 1), heads)
    halo = halo.unflatten(1, (geom.num_chunks, geom.num_levels - 1))

    # One by one: together they would take several times the memory of what is measured.
    def torch_pooled() -> Iterator[Tensor]:
        for x in tokens:
            yield torch_pool.pool(x, geom)
        for x in tokens[:2]:
            yield norms.level_scores(norms.token_scores(x, kv_heads), geom)

    def torch_gathered() -> Iterator[Tensor]:
        for x, mean in zip(tokens, means, strict=True):
            yield torch_gather.gather_one(x, mean, entries)

    def with_edges(scatter_edges: Callable[..., object]) -> Tensors:
        whole = torch_scatter.scatter(o, rows, geom)
        scatter_edges(whole, o, rows, halo, geom)
        return (whole,)

    edge = geom.num_chunks * (geom.window(geom.num_levels - 1) - 1) * row * heads
    maps = indices * (geom.pyramid_size + sub)
    scattered = row * heads * (n + sub)
    found = {
        "pool": TimedStage(
            lambda: pool.pool_and_score(tokens, geom),
            triple * (n + pooled) + 2 * indices * pooled,
            torch_pooled,
        ),
        "select": TimedStage(
            lambda: select.select(sq, sk, geom),
            2 * indices * pooled + maps,
            lambda: tuple(torch_select.select(sq, sk, geom)),
            exact=True,
        ),
        "gather": TimedStage(
            lambda: gather.gather(tokens, means, entries, geom),
            2 * triple * sub,
            torch_gathered,
            exact=True,
        ),
        "scatter": TimedStage(
            lambda: scatter.scatter(o, rows, geom),
            scattered,
            lambda: (torch_scatter.scatter(o, rows, geom),),
        ),
        "scatter_backward": TimedStage(
            lambda: scatter_backward.scatter_backward(dout, rows, geom),
            scattered,
            lambda: (torch_scatter.scatter_backward(dout, entries, geom),),
        ),
        "gather_backward": TimedStage(
            lambda: gather.gather_backward(grads, rows, geom),
            triple * (n + sub),
            lambda: (torch_gather.gather_backward_one(x, rows, geom) for x in grads),
        ),
    }
    if geom.num_chunks > 1:
        found["scatter_edges"] = TimedStage(
            lambda: scatter.scatter_edges(out, o, rows, halo, geom),
            2 * edge,
            lambda: with_edges(torch_scatter.scatter_edges),
            got=lambda: with_edges(scatter.scatter_edges),
        )
        found["edge_grads"] = TimedStage(
            lambda: scatter_backward.edge_grads(dout, geom),
            edge,
            lambda: (torch_scatter.edge_grads(dout, geom),),
        )
    return found


def tensors(results: object) -> Tensors:
    """Return a launcher's results as a tuple; an empty one if it writes in place."""
    if isinstance(results, Tensor):
        return (results,)
    if isinstance(results, Pooled):
        return (*results.means, results.sq, results.sk)
    return tuple(results) if isinstance(results, tuple) else ()


def assert_same_bits(name: str, run: Run) -> None:
    """Check that a stage gives the same bits in five runs.

    Raises:
        Wrong: it does not.
    """
    kept = tensors(run())
    for _ in range(4):
        if not all(torch.equal(a, b) for a, b in zip(kept, tensors(run()), strict=True)):
            raise Wrong(f"{name} differs from run to run")


def measure(stages: dict[str, TimedStage], copy: float) -> dict[str, Timed]:
    """Check and time every stage, forward ones first.

    Raises:
        Wrong: an output is wrong, or not the same every time.
    """
    found = {}
    for name, stage in stages.items():
        stage.check(name)
        assert_same_bits(name, stage.run)
        ms = Spread.of([1e3 * seconds for seconds in kernel_seconds(stage.run)])
        found[name] = Timed(ms, stage.num_bytes / (ms.median * 1e-3) / copy)
    return found
