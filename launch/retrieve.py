"""Ask trained models for passkeys: one digit hidden in filler, by context and depth.

    lhcp train retrieve_tiny
    python launch/retrieve.py runs/retrieve_tiny/two_stages --contexts 64 128 256
    python launch/retrieve.py runs/retrieve_32k/seed0/dense runs/retrieve_32k/seed0/1350+1350 \\
        --contexts 4096 8192 16384 32768 --out runs/retrieve_32k
    torchrun --standalone --nproc-per-node 2 launch/retrieve.py FOLDER --contexts 128 256

A folder is a checkpoint, or holds those of one arm of `lhcp train` or recover.py, of which the
newest is taken. Everything else of the model is read from the checkpoint. Under torchrun all ranks
share each text. The models must have seen such text: train them with --data.passkey 0.25.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch.distributed as dist
import tyro

from lhcp.training import retrieval_report
from lhcp.training.process import Process, run_to_exit
from lhcp.training.recovery_results import about_this
from lhcp.training.retrieval import Asked, retrieve


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Models, what to ask them, and where to put the answers."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Checkpoints, or folders with the checkpoints of one arm each."""
    asked: Annotated[Asked, tyro.conf.arg(name="")]
    out: Path | None = None
    """Folder of retrieval.json and retrieval.png; none: the first of the models'."""

    def __post_init__(self) -> None:
        if not self.folders:
            raise ValueError(
                "folders=(): must be at least one, for example runs/retrieve_tiny/two_stages"
            )


def main(arguments: Arguments, own: Process) -> None:
    """Ask one model after another, all of them the same; then show what they said."""
    found = [retrieve(place, arguments.asked, own.device) for place in arguments.folders]
    if dist.get_rank() == 0:
        folder = arguments.out or arguments.folders[0]
        retrieval_report.write(found, folder, about_this(own.device))


if __name__ == "__main__":
    try:
        chosen = tyro.cli(Arguments, description=__doc__)
    except ValueError as error:
        sys.exit(f"launch/retrieve.py: {error}")
    run_to_exit(lambda own: main(chosen, own))
