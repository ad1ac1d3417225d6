"""Measure the table by which a rotation is chosen: blocks of attention, copies, merges and links.

    torchrun --nproc-per-node 8 -m lhcp calibrate --out b200.json
    lhcp calibrate --seqlens 2048 8192 32768

Then `rotation=lhcp.read_calibration("b200.json", group)` chooses by it. One process measures no
links. Sizes that are not given are a GPU's, or small ones on a CPU, where they take a minute.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
import tyro

from lhcp.cost.calibration import Calibration
from lhcp.measure.calibrate import Grid, calibrate
from lhcp.training.placement import over_nodes
from lhcp.training.process import Process, run_to_exit

ON = {
    "cuda": Grid(
        heads=8,
        head_dim=128,
        dtype=torch.bfloat16,
        seqlens=(2048, 8192, 32768, 65536),
        queries=(512, 1024, 2048, 4096, 8192),
        keys=(1024, 4096, 16384, 65536),
    ),
    "cpu": Grid(
        heads=4,
        head_dim=64,
        dtype=torch.float32,
        seqlens=(256, 1024, 2048),
        queries=(256, 1024),
        keys=(256, 1024),
    ),
}
"""What is measured where nothing else is asked for."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Sizes of the blocks, and where the table goes."""

    out: str = "calibration.json"
    """The file to write."""
    heads: int | None = None
    head_dim: int | None = None
    dtype: str | None = None
    """As torch names it."""
    seqlens: tuple[int, ...] | None = None
    """Of causal squares."""
    queries: tuple[int, ...] | None = None
    """Of the grid of blocks without a mask."""
    keys: tuple[int, ...] | None = None
    backend: str = "auto"
    """The block attention, by its name."""
    nodes: int = 1
    """Of as many ranks each: above 1, links inside and across are measured apart."""

    def grid(self, device: torch.device) -> Grid:
        """Return what is measured on a device.

        Raises:
            ValueError: the dtype is none of torch's, or a size is not positive.
        """
        chosen = {
            field.name: getattr(ON[device.type], field.name)
            for field in fields(Grid)
            if field.name not in ("backend", "repeats")
        }
        for name in chosen:
            if (asked := getattr(self, name)) is not None:
                chosen[name] = asked
        if isinstance(chosen["dtype"], str):
            dtype = getattr(torch, chosen["dtype"], None)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"dtype={chosen['dtype']!r}: torch has none; take bfloat16")
            chosen["dtype"] = dtype
        for name in ("seqlens", "queries", "keys"):
            if any(size < 1 for size in chosen[name]):
                raise ValueError(f"{name}={chosen[name]}: sizes must be positive")
        if not chosen["seqlens"]:
            raise ValueError("seqlens=(): needs at least one, for example 2048")
        return Grid(**chosen, backend=self.backend)


def rows(found: Calibration) -> list[str]:
    """Return a table in words."""
    lines = [
        f"causal {n:>8,}: {1e3 * forward:9.3f} ms forward {1e3 * backward:9.3f} backward"
        for n, forward, backward in found.square
    ]
    lines += [
        f"full {n:>7,} x {m:>8,}: {1e3 * forward:9.3f} ms {1e3 * backward:9.3f}"
        for n, m, forward, backward in found.full
    ]
    host = found.host
    lines += [
        f"copies {found.copy_bandwidth / 1e9:.1f} GB/s, merges {found.merge_bandwidth / 1e9:.1f}",
        f"host: {1e6 * host.call:.0f} us a call, {1e6 * host.message:.0f} a message, "
        f"{1e6 * host.launch:.0f} a copy",
    ]
    if dist.get_world_size() == 1:
        return [*lines, "messages: not measured, one process"]
    return lines + [
        f"{name}: {1e6 * link.latency:.1f} us, {link.bandwidth / 1e9:.2f} GB/s, gathers take "
        f"{link.gather_factor:.2f} of that time a byte, all-to-alls {link.alltoall_factor:.2f}"
        for name, link in (("inside", found.inner), ("across", found.outer))
    ]


def main(arguments: Arguments, own: Process) -> None:
    """Measure on all ranks; rank 0 prints the table and writes it."""
    ranks = over_nodes(arguments.nodes, own.device)

    def say(text: str) -> None:
        if own.rank == 0:
            print(text, flush=True)

    grid = arguments.grid(own.device)
    found = calibrate(ranks, own.device, grid, arguments.nodes, say=say)
    if own.rank == 0:
        found.save(arguments.out)
    say("\n".join(rows(found)) + f"\nwritten: {arguments.out}")


def start(arguments: Sequence[str]) -> None:
    """Read the command line and measure."""
    chosen = tyro.cli(Arguments, prog="lhcp calibrate", description=__doc__, args=arguments)
    run_to_exit(lambda own: main(chosen, own))
