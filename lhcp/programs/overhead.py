"""What does sharing a sequence cost these ranks? One sentence, for sizes of yours.

    torchrun --standalone --nproc-per-node 8 -m lhcp overhead --seqlen 98304
    torchrun ... -m lhcp overhead --seqlen 98304 --dense --heads 32 --kv-heads 8
    torchrun ... -m lhcp overhead --seqlen 98304 --step-seconds 1.9 --layers 26
    torchrun --nnodes 4 ... -m lhcp overhead --seqlen 1048576 --nodes 4 --rotation hybrid

With --step-seconds and --layers: the share of your training step. The layer is that of
LighthouseConfig.fit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from lhcp.config import LighthouseConfig
from lhcp.context.context_parallel import ContextParallel
from lhcp.cost.tables import read_calibration
from lhcp.measure import measure_overhead
from lhcp.ring.heads import TWO_AXES
from lhcp.training.placement import over_nodes
from lhcp.training.process import Process, run_to_exit


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Sizes of one layer, what it is compared with, and what it may take."""

    seqlen: int
    """N, tokens of the whole sequence, padded to what fits."""
    heads: int = 8
    kv_heads: int | None = None
    """As many as heads where not given."""
    head_dim: int = 128
    batch: int = 1
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """auto: bfloat16 on a GPU, else float32."""
    dense: bool = False
    """Dense attention over all tokens, in place of a lighthouse layer."""
    num_levels: int = 3
    pool_factor: int = 4
    topk: int = 1536
    num_strata: int = 16
    """These four are wishes: what fits the length and the ranks is taken, and said."""
    layout: Literal["zigzag", "contiguous"] = "zigzag"
    rotation: str = "auto"
    """By its name."""
    calibration: str = ""
    """A table by which the rotation is chosen, of `lhcp calibrate`; empty: `rotation` says."""
    nodes: int = 1
    """Of as many ranks each: above 1, rotations for several nodes can be measured."""
    backend: str = "auto"
    """The block attention, by its name."""
    kernels: str = "auto"
    budget: float = 30.0
    """Seconds that the measurement may take."""
    step_seconds: float | None = None
    """Of a training step of yours."""
    layers: int = 1
    """Attention layers in that step."""
    table: bool = False
    """Print all times too."""
    json: Path | None = None
    """A file for all numbers."""

    def config(self, world_size: int) -> LighthouseConfig | None:
        """Return the layer that fits, or None for dense attention."""
        if self.dense:
            return None
        return LighthouseConfig.fit(
            self.seqlen,
            world_size,
            num_levels=self.num_levels,
            pool_factor=self.pool_factor,
            topk=self.topk,
            num_strata=self.num_strata,
        )


def main(arguments: Arguments, own: Process) -> None:
    """Measure on all ranks; rank 0 prints."""
    a, config = arguments, arguments.config(own.world_size)
    if a.calibration and a.rotation != "auto":
        raise ValueError(
            f"calibration={a.calibration!r} and rotation={a.rotation!r}: both choose a rotation; "
            "leave one out"
        )
    if a.nodes == 1 and a.rotation in TWO_AXES:
        raise ValueError(
            f"rotation={a.rotation!r}: is for several nodes; say with --nodes 2 that these ranks "
            "are on two, or count as two"
        )
    ranks, dtype = over_nodes(a.nodes, own.device), a.dtype
    padded = ContextParallel(ranks, layout=a.layout).padded_length(a.seqlen, config)
    if dtype == "auto":
        dtype = "bfloat16" if own.device.type == "cuda" else "float32"
    report = measure_overhead(
        config,
        seqlen=padded,
        num_heads=a.heads,
        num_kv_heads=a.kv_heads,
        head_dim=a.head_dim,
        batch=a.batch,
        dtype=getattr(torch, dtype),
        group=ranks,
        layout=a.layout,
        rotation=read_calibration(a.calibration, ranks) if a.calibration else a.rotation,
        backend=a.backend,
        kernels=a.kernels,
        device=own.device,
        budget=a.budget,
    )
    if own.rank:
        return
    print(report.verdict(a.step_seconds, a.layers))
    if config is not None:
        print(config)
    lines = report.table().splitlines()
    print("\n".join(lines if a.table else lines[:1]), flush=True)
    if a.json is not None:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(report.to_json() + "\n")


def start(arguments: Sequence[str]) -> None:
    """Read the command line and measure."""
    chosen = tyro.cli(Arguments, prog="lhcp overhead", description=__doc__, args=arguments)
    run_to_exit(lambda own: main(chosen, own))
