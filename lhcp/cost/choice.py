"""Which rotation "auto" is: the one that the cost model predicts to be the fastest.

The model reads static sizes and a calibration alone, so ranks that ask alike are answered alike.
"""

import logging
from functools import cache

import torch
import torch.distributed as dist

from lhcp.comm.mesh import Group, Ranks, as_ranks
from lhcp.cost.calibration import B200, CPU, H200, Calibration
from lhcp.cost.clocks import Sizes
from lhcp.cost.cost_model import choose

_log = logging.getLogger("lhcp")


def read_calibration(path: str, group: Group | Ranks = None) -> Calibration:
    """Read a file of bench/calibrate.py on rank 0 and give it to every rank of the group.

    A collective. Pass the result as `rotation`, in place of "auto".

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
    """Return the table that "auto" reads: a B200's, else an H200's, or a CPU's."""
    if device != "cuda":
        return CPU
    return B200 if torch.cuda.get_device_capability()[0] >= 10 else H200


@cache
def _from_text(text: str) -> Calibration:
    return Calibration.from_text(text, "the table given as rotation")


def fastest_rotation(
    seqlen: int,
    world_size: int,
    node_size: int | None,
    heads: tuple[int, int],
    head_dim: int,
    batch: int,
    element_bytes: int,
    layout: str,
    causal: bool,
    device: str,
    table: str | None,
) -> str:
    """Return the rotation that is predicted to be the fastest, and log it once.

    Plain arguments, since torch.compile calls it while it traces and keeps the answer.

    Args:
        seqlen: tokens or entries of all ranks. node_size: ranks of a node; None for a mesh of one
            axis. heads: of queries, of keys. device: the type of device.
        table: a `Calibration` as text; None for the built-in one of the device.
    """
    calibration = built_in(device) if table is None else _from_text(table)
    return _fastest(
        Sizes(
            seqlen=seqlen,
            world_size=world_size,
            num_heads=heads[0],
            num_kv_heads=heads[1],
            head_dim=head_dim,
            batch=batch,
            element_bytes=element_bytes,
            grad_bytes=max(4, element_bytes),
            layout=layout,  # type: ignore[arg-type]
            causal=causal,
            node_size=node_size,
        ),
        calibration,
    )


# What torch.compiler.assume_constant_result does, which imports the compiler, and Triton with it.
fastest_rotation._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _fastest(sizes: Sizes, calibration: Calibration) -> str:
    rotation, reason = choose(sizes, calibration)
    _log.info(
        "rotation %r for %d ranks, %d tokens: %s",
        rotation,
        sizes.world_size,
        sizes.seqlen,
        reason,
    )
    return rotation
