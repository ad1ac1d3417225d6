"""What a checkpoint is of: found by its path, and the run that wrote it."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from lhcp.config import LighthouseConfig
from lhcp.training import checkpoint
from lhcp.training.checkpoint_files import COMPLETE, DamagedCheckpoint, trouble_with
from lhcp.training.model_config import ModelConfig
from lhcp.training.run import Run
from lhcp.training.stages import OptimConfig


def find_checkpoint(place: Path) -> Path:
    """Return the checkpoint that a path names: itself, or the newest whole one of a run's folder.

    Every rank calls it.

    Raises:
        FileNotFoundError: there is none; the message names the folders inside that have some.
        DamagedCheckpoint: the one that is named is damaged.
        NoCheckpointLeft: all of the folder's are.
    """
    if (place / COMPLETE).exists():
        if trouble := trouble_with(place):
            raise DamagedCheckpoint(f"{place}: {trouble}")
        return place
    if (path := checkpoint.latest(place)) is not None:
        return path
    inside = sorted({str(p.parent.parent) for p in place.glob(f"**/{COMPLETE}")})
    hint = f"; name one of {', '.join(inside)}" if inside else "; is it a folder of --out?"
    raise FileNotFoundError(f"{place}: no whole checkpoint (step-00000100){hint}")


def trained_run(path: Path, world_size: int) -> tuple[Run, int, list[tuple[str, int]]]:
    """Return the run that a checkpoint is of, all ranks on one sequence; its steps and stages.

    Raises:
        ValueError: the checkpoint does not say what its run was.
    """
    done, beside = checkpoint.read_beside(path)
    known = beside.get("identity", {})

    def record(kind: type, prefix: str) -> Any:
        names = [field.name for field in fields(kind) if f"{prefix}.{field.name}" in known]
        values = {name: known[f"{prefix}.{name}"] for name in names}
        return kind(**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})

    lacking = [n for n in ("seqlen", "seed", "stages", "dtype", "model.dim") if n not in known]
    if lacking:
        raise ValueError(
            f"{path}: its identity lacks {', '.join(lacking)}: it was written by an older version; "
            "go on with its run for a step, which writes a new one"
        )
    run = Run(
        name=path.parent.name,
        model=record(ModelConfig, "model"),
        lighthouse=record(LighthouseConfig, "lighthouse"),
        optim=record(OptimConfig, "optim"),
        seqlen=known["seqlen"],
        global_batch=1,
        seed=known["seed"],
        lighthouse_steps=0,
        dense_steps=done,
        cp=world_size,
        dtype="bf16" if known["dtype"] == "bfloat16" else "fp32",
        # Each context would record graphs of its own for a few forwards.
        graphs="off",
    )
    return run, done, [(mode, steps) for mode, steps in known["stages"]]
