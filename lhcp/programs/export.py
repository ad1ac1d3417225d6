"""Write a trained model as a folder that transformers' LlamaForCausalLM reads.

    lhcp export runs/demo/two_stages --out runs/demo/llama

The folder is a checkpoint, or holds those of one arm of a run, of which the newest is taken.
Written are model.safetensors, config.json, a tokenizer whose ids are bytes, and a README.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from lhcp.training.export import export
from lhcp.training.process import Process, run_to_exit


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to export, and where to."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A checkpoint, or the folder with the checkpoints of one arm."""
    out: Path
    """The folder to make."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights; training keeps them in float32."""
    any_stage: bool = False
    """Export a model whose last stage was not dense, too."""


def main(arguments: Arguments, own: Process) -> None:
    """Export on one rank."""
    if own.world_size > 1:
        raise ValueError(f"{own.world_size} ranks: one process exports; start it without torchrun")
    taken = export(
        arguments.checkpoint,
        arguments.out,
        dtype=getattr(torch, arguments.dtype),
        any_stage=arguments.any_stage,
    )
    print(f"{taken}: written as a Llama to {arguments.out}", flush=True)


def start(arguments: Sequence[str]) -> None:
    """Read the command line and export."""
    chosen = tyro.cli(Arguments, prog="lhcp export", description=__doc__, args=arguments)
    run_to_exit(lambda own: main(chosen, own))
