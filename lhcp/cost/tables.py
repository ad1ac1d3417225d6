"""The built-in tables, and one's own read on every rank."""

from dataclasses import replace

import torch
import torch.distributed as dist

from lhcp.comm.mesh import Group, Ranks, as_ranks
from lhcp.cost.calibration import Calibration, Host, Link


def read_calibration(path: str, group: Group | Ranks = None) -> Calibration:
    """Read a file of `lhcp calibrate` on rank 0 and give it to every rank of the group.

    A collective. Pass the result as `rotation`: this machine's times then decide which it is.

    Raises:
        ValueError, OSError: the file is not there or holds no calibration; on every rank.
    """
    ranks = as_ranks(group)
    said: list[Calibration | Exception | None] = [None]
    if ranks.rank == 0:
        try:
            said[0] = Calibration.load(path)
        except (OSError, ValueError) as error:
            said[0] = error
    if ranks.world_size > 1:
        dist.broadcast_object_list(said, group=ranks.flat, group_src=0)
    if isinstance(said[0], Exception):
        raise said[0]
    assert said[0] is not None
    return said[0]


def built_in(device: str) -> Calibration:
    """Return the table of a type of device: a B200's, else an H200's, or a CPU's."""
    if device != "cuda":
        return CPU
    return B200 if torch.cuda.get_device_capability()[0] >= 10 else H200


def _full_blocks(
    rate: tuple[float, float], tiles: int
) -> tuple[tuple[int, int, float, float], ...]:
    """Return a grid of blocks without a mask, 8 heads of 128, at `rate` where they fill a GPU.

    The forward works on tiles of 128 queries, the backward on tiles of 128 keys; with fewer than
    `tiles` of them a part of the machine is idle.
    """
    rows = []
    for queries in (2**i for i in range(8, 18)):
        for keys in (2**i for i in range(8, 20)):
            flops = 4 * queries * keys * 8 * 128
            filled = [min(1.0, n * 8 / 128 / tiles) for n in (queries, keys)]
            rows.append(
                (queries, keys, flops / rate[0] / filled[0], 2.5 * flops / rate[1] / filled[1])
            )
    return tuple(rows)


H200 = Calibration(
    name="H200",
    source=(
        "NVIDIA H200, torch 2.11.0+cu130, cuDNN 9.19, bf16, 2026-11-23 and -24. Blocks without a "
        "mask: 690 and 600 TFLOP/s where they fill 128 tiles, after prefixes of 2,048 to 16,384 "
        "queries. NVLink between two of them, 2026-11-25: 300 GB/s a direction, and 120 us for a "
        "batch of messages as the host launches it: 100 of these are taken to be the host's. A "
        "small Triton kernel takes the host 55 us (2026-11-26), a block call about 75. InfiniBand "
        "is not measured: 400 Gb/s at 80%, one NIC a GPU, 10 us more than NVLink"
    ),
    num_heads=8,
    head_dim=128,
    square=(
        (6144, 0.206e-3, 0.550e-3),
        (8192, 0.291e-3, 0.774e-3),
        (12288, 0.643e-3, 1.58e-3),
        (18432, 1.23e-3, 3.11e-3),
        (24576, 2.06e-3, 5.42e-3),
        (32768, 3.43e-3, 9.91e-3),
        (49152, 8.23e-3, 23.1e-3),
        (65536, 14.7e-3, 40.1e-3),
        (98304, 34.2e-3, 91.9e-3),
        (131072, 61.1e-3, 163.9e-3),
        (262144, 268e-3, 649e-3),
    ),
    full=_full_blocks((690e12, 600e12), 128),
    copy_bandwidth=4.2e12,
    merge_bandwidth=3.0e12,
    launch=5e-6,
    inner=Link(latency=20e-6, bandwidth=300e9, hop=1e-6),
    outer=Link(latency=30e-6, bandwidth=40e9, hop=3e-6),
    nics=8,
    host=Host(call=75e-6, message=100e-6, launch=55e-6),
)

B200 = replace(
    H200,
    name="B200",
    source=(
        "not measured: the H200's blocks divided by 2.27 and its copy by 1.67, the ratios of the "
        "published bf16 and memory rates; NVLink 5 and 400 Gb/s InfiniBand at 80% of their rates; "
        "the H200's host and latencies"
    ),
    square=tuple((n, f / 2.27, b / 2.27) for n, f, b in H200.square),
    full=_full_blocks((690e12 * 2.27, 600e12 * 2.27), 148),
    copy_bandwidth=7.0e12,
    merge_bandwidth=5.0e12,
    inner=Link(latency=20e-6, bandwidth=720e9, hop=1e-6),
)

CPU = Calibration(
    name="cpu",
    source=(
        "a guess at one thread of a server's core, torch's CPU kernel, fp32, and at what gloo "
        "takes of it for a byte; calibrate your own"
    ),
    num_heads=4,
    head_dim=64,
    square=((256, 1.2e-3, 3.5e-3), (1024, 15e-3, 45e-3), (4096, 220e-3, 650e-3)),
    copy_bandwidth=8e9,
    merge_bandwidth=3e9,
    launch=20e-6,
    inner=Link(latency=100e-6, bandwidth=1e9),
    outer=Link(latency=200e-6, bandwidth=100e6),
    byte_compute=0.4e-9,
)

CALIBRATIONS = {calibration.name: calibration for calibration in (H200, B200, CPU)}


def built_in_calibration(name: str) -> Calibration:
    """Return a built-in table, to pass as `rotation`, or its `in_graphs()`; the same on every rank.

    Args:
        name: "H200", "B200" or "cpu".

    Raises:
        ValueError: no table is called so.
    """
    if name not in CALIBRATIONS:
        raise ValueError(f"name={name!r}: built-in tables are {', '.join(CALIBRATIONS)}")
    return CALIBRATIONS[name]


def read_or_built_in(name: str) -> Calibration:
    """Return the built-in table called so, or what the file of that name holds, on this rank.

    Raises:
        ValueError, OSError: there is neither, or it holds no calibration.
    """
    return CALIBRATIONS.get(name) or Calibration.load(name)
