"""What makes a run the run that it is: the fields that a checkpoint and whoever goes on share."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from lhcp.comm.comparison import compare
from lhcp.comm.mesh import Ranks
from lhcp.training.files import Manifest
from lhcp.training.run import Run
from lhcp.training.stages import Stage, completed, total_steps

MAY_CHANGE = {
    "name": "what it is called",
    "out": "where it is kept",
    "accept": "what may differ",
    "timeout": "how long ranks wait",
    "debug": "what is compared and logged",
    "on_bad_step": "what is done where a run would end",
    "spike_factor": "what is done where a run would end",
    "cp": "the mesh",
    "tp": "the mesh",
    "layout": "the mesh",
    "rotation": "how it is computed: up to rounding the same",
    "nodes": "the mesh",
    "calibration": "how it is computed: up to rounding the same",
    "backend": "how it is computed: up to rounding the same",
    "kernels": "how it is computed: up to rounding the same",
    "accumulate": "how it is computed: up to rounding the same",
    "compile": "how it is computed: up to rounding the same",
    "graphs": "how it is computed: up to rounding the same",
    "recompute": "how it is computed: up to rounding the same",
    "offload": "where activations wait",
    "lighthouse_steps": "what is to come; the stages that are done are compared",
    "dense_steps": "what is to come; the stages that are done are compared",
    "baseline": "another run beside it",
    "eval_every": "what is logged",
    "checkpoint_every": "what is kept",
    "keep_checkpoints": "what is kept",
    "sample_bytes": "what is logged",
    "diagnose": "what is logged",
    "rotation_budget": "what is logged",
    "logs": "what is logged",
    "profile": "what is logged",
}
"""Fields of `Run` that may differ when it goes on, and why."""

Identity = dict[str, Any]

ADDED: Identity = {
    "data.passkey": 0.0,
    "data.documents": False,
    "data.restart_positions": False,
    "short.steps": 0,
    "short.seqlen": 2048,
    "short.global_batch": 32,
    "short.lr": 1e-3,
}
"""What younger fields were in runs of before there were such fields."""


@dataclass(frozen=True)
class Change:
    """A difference that a run went on with, because its user accepted it."""

    step: int
    """Steps done when it came."""
    name: str
    before: Any
    now: Any


def identity(
    run: Run, stages: Sequence[Stage], manifest: Manifest, dtype: torch.dtype, done: int
) -> Identity:
    """Return what a checkpoint after `done` steps of a run must share with who goes on from it.

    Args:
        run: The run; every field that is not in `MAY_CHANGE` counts.
        stages: Its stages; those that are done count, up to `done` steps.
        manifest: Its files; names, sizes and contents count, not where they are.
        dtype: What it computes in.
        done: Steps done.
    """
    found: Identity = {}
    for name, value in asdict(run).items():
        if name in MAY_CHANGE or name in ("data", "dtype"):
            continue
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": plain(inside) for inner, inside in value.items()}
            found.pop("short.out", None)
        else:
            found[name] = plain(value)
    if run.optim.decay != "constant":
        # The rate of each step follows from how many there will be.
        found["optim.decay_over"] = total_steps(stages)
    return found | {
        "dtype": str(dtype).removeprefix("torch."),
        "data.heldout": run.data.heldout,
        "data.passkey": run.data.passkey,
        "data.documents": run.data.documents,
        "data.restart_positions": run.data.restart_positions,
        "data.files": manifest.digest,
        "stages": [[stage.mode, stage.steps] for stage in completed(stages, done)],
    }


def agree(run: Run, manifest: Manifest) -> None:
    """Check that all ranks were started with the same run and see the same files; all call it.

    Raises:
        ValueError: they were not, or do not; the message names the rank and what differs.
    """
    fields = {"data.files": manifest.digest}
    for name, value in asdict(run).items():
        inner = value.items() if isinstance(value, Mapping) else {}
        fields |= {f"{name}.{key}": str(inside) for key, inside in inner} or {name: str(value)}
    compare(Ranks(dist.group.WORLD), fields)


def plain(value: Any) -> Any:
    """Return a value as it comes back from JSON."""
    return list(value) if isinstance(value, tuple) else value


def accepted_changes(
    before: Identity, now: Identity, accept: Sequence[str], done: int, *, details: str
) -> list[Change]:
    """Return the differences between two identities, all of which the user accepted.

    Args:
        before: As written with the checkpoint.
        now: Of the run that goes on.
        accept: Names of differences that are meant.
        done: Steps done.
        details: What to say of files that differ.

    Raises:
        ValueError: a difference is not in `accept`, or `accept` has a name that is no field's.
    """
    unknown = [name for name in accept if name not in now]
    if unknown:
        raise ValueError(f"accept: no field is called {', '.join(unknown)}; there are {list(now)}")
    before = ADDED | before
    changes = [
        Change(done, name, before.get(name, "not recorded"), now.get(name, "none"))
        for name in {**now, **before}
        if before.get(name) != now.get(name)
    ]
    refused = [change for change in changes if change.name not in accept]
    if refused:
        said = "; ".join(
            f"{c.name}: files of the text differ: {details}"
            if c.name == "data.files"
            else f"{c.name}: {c.before} there, {c.now} here"
            for c in refused
        )
        raise ValueError(
            f"the checkpoint was written by a run that differs in {said}. Give those as they were, "
            "or another folder with --out; if it is meant, go on with --accept "
            + " ".join(c.name for c in changes)
        )
    return changes
