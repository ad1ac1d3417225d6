"""Measure a `Calibration`: blocks of attention, copies, merges and links, on these ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from lhcp.comm.mesh import Ranks
from lhcp.cost.calibration import Calibration, Host, Link
from lhcp.layer.plan import choose_backend
from lhcp.measure.clock import copy_bandwidth, launched_seconds, seconds_of
from lhcp.measure.links import link, long_message, round_the_ring
from lhcp.measure.rank_values import barrier, gathered, slowest
from lhcp.measure.rates import byte_compute, collective_factors, host_seconds
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
    forward = launched_seconds(lambda: block.forward(q, kv, mask, scale), device, grid.repeats)
    backward = launched_seconds(lambda: block.backward(inputs, mask, scale), device, grid.repeats)
    return forward, backward


def merge_of_three(grid: Grid, device: torch.device, rows: int) -> tuple[Callable[[], None], int]:
    """Return the merge of three partial outputs of so many rows, and the bytes that it moves."""
    heads, head_dim, dtype = grid.heads, grid.head_dim, grid.dtype
    out, *parts = torch.zeros(4, 1, rows, heads, head_dim, dtype=dtype, device=device)
    lse, *lses = torch.zeros(4, 1, heads, rows, dtype=wide(dtype), device=device)
    wholes = [Partial.whole(*part) for part in zip(parts, lses, strict=True)]
    return lambda: merge(out, lse, wholes), 4 * out.nbytes


def measured_host(grid: Grid, name: str, device: torch.device) -> Host:
    """Measure what the host takes for a call and a sum, each too short for the GPU."""
    block, scale = BLOCKS[name], grid.head_dim**-0.5
    q = torch.zeros(1, 128, grid.heads, grid.head_dim, dtype=grid.dtype, device=device)
    small, _ = merge_of_three(grid, device, 128)
    return Host(
        call=host_seconds(lambda: block.forward(q, KV(q, q), CAUSAL, scale), device),
        launch=host_seconds(small, device),
    )


def calibrate(
    ranks: Ranks,
    device: torch.device,
    grid: Grid,
    nodes: int = 1,
    large_message: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Calibration:
    """Measure on all ranks at once; what is kept of blocks, merges and links is the slowest's.

    Args:
        ranks: of two axes, with several ranks a node: the links inside and across are measured
            apart, else both round the ring of all.
        nodes: how many they are on.
        large_message: bytes of the long message that gives the bandwidth.
        say: is told what comes next.
    """
    cuda = device.type == "cuda"
    name = choose_backend(grid.backend, grid.dtype, grid.head_dim, device).name
    say(f"blocks of {name}: {len(grid.seqlens)} causal, {len(grid.queries) * len(grid.keys)} full")

    def timed(queries: int, keys: int, mask: Mask) -> tuple[float, float]:
        """Time a block on all ranks at once: the slowest sets the pace, as in an attention."""
        barrier(ranks, device)
        forward, backward = block_seconds(name, grid, queries, keys, mask, device)
        return slowest(forward, ranks), slowest(backward, ranks)

    square = [(n, *timed(n, n, CAUSAL)) for n in sorted(grid.seqlens)]
    full = [(n, m, *timed(n, m, FULL)) for n in sorted(grid.queries) for m in sorted(grid.keys)]
    tiny = torch.zeros(1, device=device)
    large_merge, merged_bytes = merge_of_three(grid, device, 2**16 if cuda else 2**12)
    nothing = Link(latency=0.0, bandwidth=1e18)
    title = torch.cuda.get_device_name(device) if cuda else "cpu"
    calibration = Calibration(
        name=title,
        source=f"lhcp calibrate, torch {torch.__version__}, {name}, {grid.dtype}, "
        f"{ranks.world_size} ranks, {nodes} nodes; links as round the ring of all, or, of several "
        "ranks a node, inside and across apart",
        num_heads=grid.heads,
        head_dim=grid.head_dim,
        square=tuple(square),
        full=tuple(full),
        copy_bandwidth=copy_bandwidth(device),
        merge_bandwidth=merged_bytes / slowest(seconds_of(large_merge, device), ranks),
        launch=launched_seconds(lambda: tiny.add_(1), device),
        inner=nothing,
        outer=nothing,
        host=measured_host(grid, name, device),
    )
    if ranks.world_size > 1:
        say(f"messages between {ranks.world_size} ranks")
        calibration = with_links(calibration, ranks, device, large_message)
        if not cuda:
            block, scale = BLOCKS[name], grid.head_dim**-0.5
            q = torch.randn(1, square[0][0], grid.heads, grid.head_dim, dtype=grid.dtype)
            kv, rate = KV(q, q), calibration.inner.bandwidth
            taken = byte_compute(lambda: block.forward(q, kv, CAUSAL, scale), rate, inside(ranks))
            calibration = replace(calibration, byte_compute=taken)
    return gathered(calibration, ranks)[0]


def inside(ranks: Ranks) -> Ranks:
    """Return the ranks of the own node where it has several; else all."""
    return ranks if ranks.node_size in (None, 1) else Ranks(ranks.inner)


def with_links(
    calibration: Calibration,
    ranks: Ranks,
    device: torch.device,
    large_message: int | None = None,
) -> Calibration:
    """Return a table with the links between these ranks, measured now; a collective."""
    large, near = large_message or long_message(device), inside(ranks)
    post = round_the_ring(1024, ranks, device)
    barrier(ranks, device)
    message = slowest(host_seconds(lambda: post().wait(), device), ranks)
    inner = measured_link(near, ranks, device, large)
    # Across, all ranks of a node send at once, as in a rotation.
    outer = inner if near is ranks else measured_link(Ranks(ranks.outer), ranks, device, large)
    host = replace(calibration.host, message=message)
    return replace(calibration, inner=inner, outer=outer, host=host)


def measured_link(ranks: Ranks, everyone: Ranks, device: torch.device, large: int) -> Link:
    """Return the link round a ring of ranks, with what gathers and all-to-alls take on it.

    All rings are measured at once, and the slowest one's is returned on every rank.
    """
    barrier(everyone, device)
    of_link = link(ranks, device, large, launched_seconds)
    latency, rate = of_link["latency_us"] / 1e6, 1e9 * of_link["gb_s"]
    gather_factor, alltoall_factor, empty = collective_factors(
        ranks, device, rate, large, launched_seconds
    )
    # All of it: the gathers' bandwidth is what remains of their time beside it.
    hop = max(0.0, empty - latency) / (ranks.world_size - 1)
    found = Link(
        latency=latency,
        bandwidth=rate,
        hop=hop,
        gather_factor=gather_factor,
        alltoall_factor=alltoall_factor,
    )
    return min(gathered(found, everyone), key=lambda of_ring: of_ring.bandwidth)
