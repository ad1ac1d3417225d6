"""Measure a `Calibration`: blocks of attention, copies, merges and links, on these ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lhcp.comm.mesh import Ranks
from lhcp.cost.calibration import Calibration, Link
from lhcp.layer.plan import choose_backend
from lhcp.measure.clock import copy_bandwidth, seconds_of
from lhcp.measure.links import link, long_message
from lhcp.measure.rank_values import gathered
from lhcp.measure.rates import byte_compute, collective_factors
from lhcp.precision import wide
from lhcp.ring.block import BLOCKS
from lhcp.ring.block.base import BackwardInputs
from lhcp.ring.kv import KV
from lhcp.ring.merge.merge import merge
from lhcp.ring.merge.partial import Partial
from lhcp.ring.shape import CAUSAL, FULL, Mask


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The sizes that blocks of attention are measured at, and how."""

    heads: int
    head_dim: int
    dtype: torch.dtype
    seqlens: Sequence[int]
    """Of the causal squares."""
    queries: Sequence[int]
    """Of the grid of blocks without a mask; it may be empty."""
    keys: Sequence[int]
    backend: str = "auto"
    repeats: int = 7


def block_seconds(
    name: str, grid: Grid, queries: int, keys: int, mask: Mask, device: torch.device
) -> tuple[float, float]:
    """Return forward and backward seconds of one block."""
    block, scale, row = BLOCKS[name], grid.head_dim**-0.5, (grid.heads, grid.head_dim)
    q = torch.randn(1, queries, *row, dtype=grid.dtype, device=device)
    kv = KV(*torch.randn(2, 1, keys, *row, dtype=grid.dtype, device=device))
    inputs = BackwardInputs(torch.randn_like(q), q, kv, *block.forward(q, kv, mask, scale))
    forward = seconds_of(lambda: block.forward(q, kv, mask, scale), device, grid.repeats)
    backward = seconds_of(lambda: block.backward(inputs, mask, scale), device, grid.repeats)
    return forward, backward


def merge_bandwidth(grid: Grid, device: torch.device) -> float:
    """Return counted bytes a second of the merge of three, so large that launching is nothing."""
    heads, head_dim, dtype = grid.heads, grid.head_dim, grid.dtype
    rows = 2**16 if device.type == "cuda" else 2**12
    out, *parts = torch.zeros(4, 1, rows, heads, head_dim, dtype=dtype, device=device)
    lse, *lses = torch.zeros(4, 1, heads, rows, dtype=wide(dtype), device=device)
    wholes = [Partial.whole(*part) for part in zip(parts, lses, strict=True)]
    seconds = seconds_of(lambda: merge(out, lse, wholes), device)
    return 4 * out.nbytes / seconds


def calibrate(
    ranks: Ranks,
    device: torch.device,
    grid: Grid,
    nodes: int = 1,
    large_message: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Calibration:
    """Measure on all ranks at once; the result is rank 0's, the links' the slowest rank's.

    Args:
        nodes: 1: all ranks share a node; else the ring of all ranks is measured as the outer link.
        large_message: bytes of the long message that gives the bandwidth.
        say: is told what comes next.
    """
    name = choose_backend(grid.backend, grid.dtype, grid.head_dim, device).name
    say(f"blocks of {name}: {len(grid.seqlens)} causal, {len(grid.queries) * len(grid.keys)} full")
    square = [(n, *block_seconds(name, grid, n, n, CAUSAL, device)) for n in sorted(grid.seqlens)]
    full = [
        (n, m, *block_seconds(name, grid, n, m, FULL, device))
        for n in sorted(grid.queries)
        for m in sorted(grid.keys)
    ]
    tiny = torch.zeros(1, device=device)
    between = Link(latency=0.0, bandwidth=1e18)
    gather_factor, alltoall_factor, taken = 1.0, 1.0, 0.0
    if ranks.world_size > 1:
        say(f"messages between {ranks.world_size} ranks")
        large = large_message or long_message(device)
        found = link(ranks, device, large)
        latency, rate = found["latency_us"] / 1e6, 1e9 * found["gb_s"]
        gather_factor, alltoall_factor, empty = collective_factors(ranks, device, rate, large)
        # All of it: the gathers' bandwidth is what remains of their time beside it.
        hop = max(0.0, empty - latency) / (ranks.world_size - 1)
        between = Link(latency=latency, bandwidth=rate, hop=hop)
        if device.type == "cpu":
            block, scale = BLOCKS[name], grid.head_dim**-0.5
            q = torch.randn(1, square[0][0], grid.heads, grid.head_dim, dtype=grid.dtype)
            taken = byte_compute(lambda: block.forward(q, KV(q, q), CAUSAL, scale), rate, ranks)
    title = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    calibration = Calibration(
        name=title,
        source=f"lhcp calibrate, torch {torch.__version__}, {name}, {grid.dtype}, "
        f"{ranks.world_size} ranks, {nodes} nodes; inside and between nodes as round the ring",
        num_heads=grid.heads,
        head_dim=grid.head_dim,
        square=tuple(square),
        full=tuple(full),
        copy_bandwidth=copy_bandwidth(device),
        merge_bandwidth=merge_bandwidth(grid, device),
        launch=seconds_of(lambda: tiny.add_(1), device),
        inner=between,
        outer=between,
        gather_factor=gather_factor,
        alltoall_factor=alltoall_factor,
        byte_compute=taken,
    )
    return gathered(calibration, ranks)[0]
