"""Each local stage of the layer: its launcher, its bytes, its check against the torch path.

A stage whose output is wrong has no time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bench.common.clock import Run, kernel_seconds
from bench.common.turns import Spread
from lhcp.lighthouse import gather as torch_gather
from lhcp.lighthouse import pool as torch_pool
from lhcp.lighthouse import scatter as torch_scatter
from lhcp.lighthouse import score as torch_score
from lhcp.lighthouse import select as torch_select
from lhcp.lighthouse.geometry import Geometry
from lhcp.lighthouse.kernels import gather, pool, scatter, scatter_backward, select


class Shape(NamedTuple):
    """Heads and rows of one problem."""

    num_heads: int = 8
    num_kv_heads: int = 8
    head_dim: int = 128
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16

    def rows(self, length: int, heads: int) -> Tensor:
        shape = (self.batch, length, heads, self.head_dim)
        return torch.randn(shape, dtype=self.dtype, device="cuda")

    def qkv(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        kv = self.num_kv_heads
        return self.rows(length, self.num_heads), self.rows(length, kv), self.rows(length, kv)


@dataclass(frozen=True)
class Stage:
    """One launcher, the bytes that it must move and its check against the torch path."""

    run: Run
    num_bytes: int
    check: Callable[[], None]


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


def build(geom: Geometry, shape: Shape) -> dict[str, Stage]:
    """Build the stages of one size on random inputs."""
    heads, kv_heads = shape.num_heads, shape.num_kv_heads
    n, sub, pooled = geom.num_tokens, geom.subsequence, geom.pooled_size
    row = shape.batch * shape.head_dim * shape.dtype.itemsize
    triple = row * (heads + 2 * kv_heads)
    indices = 4 * shape.batch * kv_heads
    q, k, v = shape.qkv(n)
    mean_q, mean_k, mean_v, sq, sk = pool.pool_and_score(q, k, v, geom)
    means = (mean_q, mean_k, mean_v)
    entries, places = select.select(sq, sk, geom)
    grads = shape.qkv(sub)
    o, dout = shape.rows(sub, heads), shape.rows(n, heads)
    out = scatter.scatter(o, places, geom)
    halo = shape.rows(geom.num_chunks * (geom.num_levels - 1), heads)
    halo = halo.unflatten(1, (geom.num_chunks, geom.num_levels - 1))

    def check_pool() -> None:
        for x, mean in zip((q, k, v), means, strict=True):
            assert_near("pool", mean, torch_pool.pool(x, geom))
        for x, score in ((q, sq), (k, sk)):
            exact = torch_score.token_scores(x, kv_heads)
            assert_near("score", score, torch_score.level_scores(exact, geom))

    def check_select() -> None:
        want = torch_select.select(sq, sk, geom)
        assert_equal("entries", entries, want.entries)
        assert_equal("places", places, want.places)

    def check_gather() -> None:
        got = gather.gather(q, k, v, *means, entries, geom)
        for x, mean, g in zip((q, k, v), means, got, strict=True):
            assert_equal("gather", g, torch_gather.gather_one(x, mean, entries))

    def check_gather_backward() -> None:
        got = gather.gather_backward(*grads, places, geom)
        for dsub, dx in zip(grads, got, strict=True):
            want = torch_gather.gather_backward_one(dsub, places, geom)
            assert_near("gather_backward", dx, want)

    def check_scatter() -> None:
        want = torch_scatter.scatter(o, places, geom)
        assert_near("scatter", scatter.scatter(o, places, geom), want)

    def check_edges() -> None:
        want = scatter.scatter(o, places, geom)
        got = want.clone()
        torch_scatter.scatter_edges(want, o, places, halo, geom)
        scatter.scatter_edges(got, o, places, halo, geom)
        assert_near("scatter_edges", got, want)

    def check_scatter_backward() -> None:
        want = torch_scatter.scatter_backward(dout, entries, geom)
        got = scatter_backward.scatter_backward(dout, places, geom)
        assert_near("scatter_backward", got, want)

    def check_edge_grads() -> None:
        got = scatter_backward.edge_grads(dout, geom)
        assert_near("edge_grads", got, torch_scatter.edge_grads(dout, geom))

    edge = geom.num_chunks * (geom.window(geom.num_levels - 1) - 1) * row * heads
    maps = indices * (geom.pyramid_size + sub)
    found = {
        "pool": Stage(
            lambda: pool.pool_and_score(q, k, v, geom),
            triple * (n + pooled) + 2 * indices * pooled,
            check_pool,
        ),
        "select": Stage(
            lambda: select.select(sq, sk, geom), 2 * indices * pooled + maps, check_select
        ),
        "gather": Stage(
            lambda: gather.gather(q, k, v, *means, entries, geom), 2 * triple * sub, check_gather
        ),
        "scatter": Stage(
            lambda: scatter.scatter(o, places, geom), row * heads * (n + sub), check_scatter
        ),
        "scatter_backward": Stage(
            lambda: scatter_backward.scatter_backward(dout, places, geom),
            row * heads * (n + sub),
            check_scatter_backward,
        ),
        "gather_backward": Stage(
            lambda: gather.gather_backward(*grads, places, geom),
            triple * (n + sub),
            check_gather_backward,
        ),
    }
    if geom.num_chunks > 1:
        found["scatter_edges"] = Stage(
            lambda: scatter.scatter_edges(out, o, places, halo, geom), 2 * edge, check_edges
        )
        found["edge_grads"] = Stage(
            lambda: scatter_backward.edge_grads(dout, geom), edge, check_edge_grads
        )
    return found


def assert_same_bits(name: str, run: Run) -> None:
    """Check that a stage gives the same bits in five runs.

    Raises:
        Wrong: it does not.
    """

    def tensors(results: object) -> tuple[Tensor, ...]:
        if isinstance(results, Tensor):
            return (results,)
        return results if isinstance(results, tuple) else ()

    kept = tensors(run())
    for _ in range(4):
        if not all(torch.equal(a, b) for a, b in zip(kept, tensors(run()), strict=True)):
            raise Wrong(f"{name} differs from run to run")


def measure(stages: dict[str, Stage], copy: float) -> dict[str, Timed]:
    """Check and time every stage, forward ones first.

    Raises:
        Wrong: an output is wrong, or not the same every time.
    """
    found = {}
    for name, stage in stages.items():
        stage.check()
        assert_same_bits(name, stage.run)
        ms = Spread.of([1e3 * seconds for seconds in kernel_seconds(stage.run)])
        found[name] = Timed(ms, stage.num_bytes / (ms.median * 1e-3) / copy)
    return found
