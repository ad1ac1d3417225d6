"""Time each local stage on one GPU against the bandwidth of a copy, after checking its output.

    python bench/latency.py --stages --seqlens 131072 262144
    python bench/latency.py --stages --share          # one CP=8 rank of a 1M-token sequence
    python bench/latency.py --sweep pool --seqlens 262144

A stage whose output differs from the torch path prints no time. The last line is JSON.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import triton

sys.path.insert(0, str(Path(__file__).parents[1]))

from lhcp.geometry import Geometry
from lhcp.lighthouse import gather as torch_gather
from lhcp.lighthouse import pool as torch_pool
from lhcp.lighthouse import scatter as torch_scatter
from lhcp.lighthouse import score as torch_score
from lhcp.lighthouse import select as torch_select
from lhcp.lighthouse.kernels import gather, pool, scatter, scatter_backward, select

SWEEPS = {
    "pool": (pool, ("TILE", "NUM_WARPS"), [(256, 1), (512, 2), (1024, 4), (1024, 2), (2048, 8)]),
    "gather": (
        gather,
        ("GATHER_TILE", "GATHER_WARPS"),
        [(1024, 1), (2048, 2), (1024, 4), (2048, 4), (4096, 4), (8192, 4), (8192, 8)],
    ),
    "gather_backward": (
        gather,
        ("SPREAD_TILE", "SPREAD_WARPS"),
        [(128, 1), (256, 1), (512, 1), (512, 2), (1024, 2), (1024, 4), (2048, 8)],
    ),
    "scatter": (
        scatter,
        ("TILE", "NUM_WARPS"),
        [(128, 1), (256, 1), (512, 1), (512, 2), (1024, 2), (1024, 4), (2048, 8)],
    ),
    "scatter_backward": (
        scatter_backward,
        ("TILE", "NUM_WARPS"),
        [(128, 1), (256, 1), (512, 1), (512, 2), (1024, 2), (1024, 4), (2048, 8)],
    ),
    "select": (
        select,
        ("KEYS_PER_WARP", "PLACE_BLOCK", "PLACE_WARPS"),
        list(product((64, 128, 256, 512), (512, 1024), (4,))),
    ),
}


@dataclass(frozen=True)
class Stage:
    """One launcher, the bytes that it must move and its check against the torch path."""

    run: Callable[[], object]
    num_bytes: int
    check: Callable[[], None]


def median_ms(run: Callable[[], object], repeats: int = 30) -> float:
    """Median of CUDA-event times; a large write between runs clears L2 and hides the launch."""
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    for _ in range(3):
        run()
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(repeats)] for _ in "ab")
    for start, end in zip(starts, ends, strict=True):
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(s.elapsed_time(e) for s, e in zip(starts, ends, strict=True))


def copy_bandwidth() -> float:
    """Bytes read and written per second by a device-to-device copy of 2 GiB."""
    source = torch.randint(-100, 100, (2**31,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (median_ms(lambda: target.copy_(source)) * 1e-3)


def assert_near(got: torch.Tensor, want: torch.Tensor) -> None:
    """Assert equality up to one unit in the last place of the dtype."""
    assert got.shape == want.shape and got.dtype == want.dtype
    for a, b in zip(got.unbind(1), want.unbind(1), strict=True) if got.ndim > 4 else [(got, want)]:
        eps = max(torch.finfo(a.dtype).eps, 1e-5)
        torch.testing.assert_close(a, b, rtol=1.01 * eps, atol=1e-5)


def stages(geom: Geometry, args: argparse.Namespace) -> dict[str, Stage]:
    """Build the stages of one size on random inputs."""
    dtype = getattr(torch, args.dtype)
    heads, kv_heads, dim = args.heads, args.kv_heads, args.head_dim

    def rows(length: int, num: int) -> torch.Tensor:
        return torch.randn((args.batch, length, num, dim), dtype=dtype, device="cuda")

    def qkv(length: int) -> tuple[torch.Tensor, ...]:
        return rows(length, heads), rows(length, kv_heads), rows(length, kv_heads)

    n, sub = geom.num_tokens, geom.subsequence
    row = args.batch * dim * dtype.itemsize
    triple = row * (heads + 2 * kv_heads)
    indices = 4 * args.batch * kv_heads
    q, k, v = qkv(n)
    *means, sq, sk = pool.pool_and_score(q, k, v, geom)
    entries, places = select.select(sq, sk, geom)
    grads = qkv(sub)
    o, dout = rows(sub, heads), rows(n, heads)
    out = scatter.scatter(o, places, geom)
    halo = rows(geom.num_chunks * (geom.num_levels - 1), heads)
    halo = halo.unflatten(1, (geom.num_chunks, geom.num_levels - 1))

    def check_pool() -> None:
        for x, mean in zip((q, k, v), means, strict=True):
            assert_near(mean, torch_pool.pool(x, geom))
        for x, score in ((q, sq), (k, sk)):
            exact = torch_score.token_scores(x, kv_heads)
            assert_near(score, torch_score.level_scores(exact, geom))

    def check_select() -> None:
        want = torch_select.select(sq, sk, geom)
        assert torch.equal(entries, want.entries) and torch.equal(places, want.places)

    def check_gather() -> None:
        got = gather.gather(q, k, v, *means, entries, geom)
        for x, mean, g in zip((q, k, v), means, got, strict=True):
            assert torch.equal(g, torch_gather.gather_one(x, mean, entries))

    def check_gather_backward() -> None:
        got = gather.gather_backward(*grads, places, geom)
        for dsub, dx in zip(grads, got, strict=True):
            assert_near(dx, torch_gather.gather_backward_one(dsub, places, geom))

    def check_scatter() -> None:
        assert_near(scatter.scatter(o, places, geom), torch_scatter.scatter(o, places, geom))

    def check_edges() -> None:
        want = scatter.scatter(o, places, geom)
        got = want.clone()
        torch_scatter.scatter_edges(want, o, places, halo, geom)
        scatter.scatter_edges(got, o, places, halo, geom)
        assert_near(got, want)

    def check_scatter_backward() -> None:
        want = torch_scatter.scatter_backward(dout, entries, geom)
        assert_near(scatter_backward.scatter_backward(dout, places, geom), want)

    def check_edge_grads() -> None:
        assert_near(scatter_backward.edge_grads(dout, geom), torch_scatter.edge_grads(dout, geom))

    pooled = geom.pooled_size
    edge = geom.num_chunks * (geom.window(geom.num_levels - 1) - 1) * row * heads
    maps = indices * (geom.pyramid_size + sub)
    return {
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
        "scatter_edges": Stage(
            lambda: scatter.scatter_edges(out, o, places, halo, geom), 2 * edge, check_edges
        ),
        "edge_grads": Stage(
            lambda: scatter_backward.edge_grads(dout, geom), edge, check_edge_grads
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


@contextmanager
def constants(module, names: tuple[str, ...], values: tuple[int, ...]):
    """Run with other tile sizes."""
    before = [getattr(module, name) for name in names]
    for name, value in zip(names, values, strict=True):
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(module, name, value)


def verdict(stage: Stage) -> str:
    try:
        stage.check()
    except AssertionError as error:
        return "WRONG " + " ".join(str(error).split())[:160]
    return "ok"


def measure(name: str, stage: Stage, ceiling: float, label: str = "") -> dict:
    """Check, time and print one stage."""
    state = verdict(stage)
    record = {"stage": name, "label": label, "check": state}
    if state == "ok":
        ms = median_ms(stage.run)
        rate = stage.num_bytes / (ms * 1e-3)
        record |= {"ms": ms, "tb_s": rate / 1e12, "of_copy": rate / ceiling}
        state = f"{ms:8.4f} ms {rate / 1e12:6.2f} TB/s {rate / ceiling:6.1%}"
    print(f"  {name:18s} {label:18s} {state}", flush=True)
    return record


def geometries(args: argparse.Namespace) -> list[Geometry]:
    """The issue's sizes (k = N / 64, 16 strata), or one CP=8 rank of 1M tokens."""
    if args.share:
        return [Geometry(131072, 2, 2, 4, 4, 256, True)]
    return [
        Geometry(
            n, args.strata, args.chunks, args.levels, args.factor, n // 64 // args.strata, True
        )
        for n in args.seqlens
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", action="store_true")
    parser.add_argument("--share", action="store_true")
    parser.add_argument("--sweep", nargs="*", choices=SWEEPS, default=[])
    parser.add_argument("--seqlens", type=int, nargs="*", default=[131072, 262144])
    parser.add_argument("--levels", type=int, default=3)
    parser.add_argument("--factor", type=int, default=4)
    parser.add_argument("--strata", type=int, default=16)
    parser.add_argument("--chunks", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()

    torch.manual_seed(0)
    ceiling = copy_bandwidth()
    revision = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    card = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": revision,
        "copy_tb_s": ceiling / 1e12,
        "args": vars(args),
    }
    print(json.dumps(card), flush=True)
    records = []
    for geom in geometries(args):
        print(f"n={geom.num_tokens} S={geom.subsequence} {geom}", flush=True)
        built = stages(geom, args)
        if args.stages or not args.sweep:
            for name, stage in built.items():
                records.append({"n": geom.num_tokens, **measure(name, stage, ceiling)})
        for name in args.sweep:
            module, names, variants = SWEEPS[name]
            for values in variants:
                with constants(module, names, values):
                    records.append(measure(name, built[name], ceiling, str(values)))
        del built
        torch.cuda.empty_cache()
    print(json.dumps({"card": card, "records": records}))


if __name__ == "__main__":
    main()
