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


_RATE = 2.27
"""Bf16 products a second of a B200 over an H200's, as published."""


def _faster(rows: int) -> float:
    """Return how much faster a B200 is than an H200 on blocks of 8 heads, as published.

    A forward works on tiles of 128 queries, a backward on tiles of 128 keys. With fewer of them
    than multiprocessors, of which a B200 has 148 and an H200 132, each card uses as many.

    Args:
        rows: queries in a forward, keys in a backward.
    """
    tiles = rows * 8 / 128
    return _RATE * min(1.0, tiles / 148) / min(1.0, tiles / 132)


H200 = Calibration(
    name="H200",
    source=(
        "NVIDIA H200, torch 2.11.0+cu130, cuDNN 9.19, NCCL 2.28.9, bf16: lhcp calibrate on two of "
        "them, 2026-11-26 (bench/results/calibration_h200x2_2026-11-26.json), timed inside CUDA "
        "graphs; squares above 65,536 tokens of 2026-11-23, launched; longer ones, and blocks of "
        "more than 8,192 queries or 65,536 keys, in proportion. InfiniBand is not measured: "
        "400 Gb/s at 80%, one NIC a GPU, 10 us more than NVLink; nor what a step of a ring "
        "collective adds (1 and 3 us), which two GPUs do not show"
    ),
    num_heads=8,
    head_dim=128,
    square=(
        (1024, 19.3e-6, 51.5e-6),
        (2048, 32.3e-6, 92.6e-6),
        (4096, 94.8e-6, 267.5e-6),
        (8192, 276.3e-6, 755.2e-6),
        (16384, 0.925e-3, 2.653e-3),
        (32768, 3.808e-3, 10.345e-3),
        (65536, 14.959e-3, 42.069e-3),
        (98304, 34.2e-3, 91.9e-3),
        (131072, 61.1e-3, 163.9e-3),
        (262144, 268e-3, 649e-3),
    ),
    full=tuple(
        (queries, keys, forward * 1e-6, backward * 1e-6)
        for queries, keys, forward, backward in (
            (512, 1024, 18.8, 31.5),
            (512, 2048, 30.5, 34.7),
            (512, 4096, 54.2, 57.7),
            (512, 8192, 101.1, 105.0),
            (512, 16384, 196.9, 187.5),
            (512, 65536, 759.9, 653.5),
            (1024, 1024, 19.0, 50.7),
            (1024, 2048, 30.9, 55.1),
            (1024, 4096, 54.7, 95.4),
            (1024, 8192, 102.1, 175.7),
            (1024, 16384, 197.5, 325.5),
            (1024, 65536, 759.4, 1322.0),
            (2048, 1024, 20.1, 88.2),
            (2048, 2048, 32.1, 93.4),
            (2048, 4096, 56.7, 170.5),
            (2048, 8192, 107.0, 315.5),
            (2048, 16384, 204.8, 606.8),
            (2048, 65536, 823.3, 2679.3),
            (4096, 1024, 33.9, 166.4),
            (4096, 2048, 57.6, 173.5),
            (4096, 4096, 106.7, 316.5),
            (4096, 8192, 206.2, 599.0),
            (4096, 16384, 402.5, 1264.8),
            (4096, 65536, 1813.0, 5141.3),
            (8192, 1024, 62.6, 319.0),
            (8192, 2048, 109.6, 327.0),
            (8192, 4096, 208.1, 614.4),
            (8192, 8192, 405.7, 1169.5),
            (8192, 16384, 830.0, 2587.6),
            (8192, 65536, 3637.7, 10209.7),
        )
    ),
    copy_bandwidth=4.26e12,
    merge_bandwidth=2.92e12,
    launch=1.6e-6,
    inner=Link(latency=9.1e-6, bandwidth=270e9, hop=1e-6, gather_factor=1.20, alltoall_factor=1.16),
    outer=Link(latency=19.1e-6, bandwidth=40e9, hop=3e-6),
    nics=8,
    host=Host(call=42e-6, message=70e-6, launch=35e-6),
)

B200 = replace(
    H200,
    name="B200",
    source=(
        "not measured: the H200's blocks divided by 2.27 and its copy by 1.67, the ratios of the "
        "published bf16 and memory rates, and fewer where a block has not a tile for each "
        "multiprocessor; NVLink 5 and 400 Gb/s InfiniBand at 80% of their rates; "
        "the H200's host and latencies"
    ),
    square=tuple((n, f / _faster(n), b / _faster(n)) for n, f, b in H200.square),
    full=tuple((q, k, f / _faster(q), b / _faster(k)) for q, k, f, b in H200.full),
    copy_bandwidth=7.1e12,
    merge_bandwidth=4.9e12,
    inner=replace(H200.inner, bandwidth=720e9),
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
