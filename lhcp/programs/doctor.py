"""What does this machine have, what would be chosen and why, how fast is it, what is wrong?

    lhcp doctor
    torchrun --standalone --nproc-per-node 8 -m lhcp doctor --seqlen 98304 --heads 32 --kv-heads 8

Under torchrun the links between the ranks are measured too. Takes some seconds. On a cluster
start it as you start training: it then sees what training would see.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import tyro

from lhcp.comm.mesh import Ranks
from lhcp.measure.doctor import Patient, examine
from lhcp.training.process import Process, run_to_exit


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The layer that is asked about."""

    seqlen: int = 32_768
    """N, tokens of the whole sequence."""
    heads: int = 8
    kv_heads: int | None = None
    """As many as heads where not given."""
    head_dim: int = 128
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """auto: bfloat16 on a GPU, else float32."""


def main(arguments: Arguments, own: Process) -> None:
    """Examine all ranks; rank 0 prints."""
    dtype = arguments.dtype
    if dtype == "auto":
        dtype = "bfloat16" if own.device.type == "cuda" else "float32"
    patient = Patient(
        seqlen=arguments.seqlen,
        num_heads=arguments.heads,
        num_kv_heads=arguments.kv_heads or arguments.heads,
        head_dim=arguments.head_dim,
        dtype=getattr(torch, dtype),
    )
    ranks = Ranks(dist.group.WORLD if own.world_size > 1 else None)
    found = examine(ranks, own.device, patient)
    if own.rank == 0:
        print(found, flush=True)


def start(arguments: Sequence[str]) -> None:
    """Read the command line and examine."""
    chosen = tyro.cli(Arguments, prog="lhcp doctor", description=__doc__, args=arguments)
    run_to_exit(lambda own: main(chosen, own))
