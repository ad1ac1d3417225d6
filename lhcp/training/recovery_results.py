"""Results of a recovery: a file for each seed with a line for each finished arm."""

import json
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lhcp.machine import commit, cpu_name, installed
from lhcp.training.history import EvalRecord, History
from lhcp.training.identity import ADDED, Identity
from lhcp.training.run import Run

COLUMNS = ("loss", "grad_norm", "seconds")
"""Fields of a step's record that a result holds; step n is row n - 1."""


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """One finished arm of one seed: dense from scratch, the lighthouse stage, or a split."""

    recipe: str
    seed: int
    arm: str
    """"dense", "lighthouse", or a split: "1350+1350", its lighthouse steps included."""
    stages: list[tuple[str, int]]
    """Name and steps of each stage, in order."""
    columns: dict[str, list[float]]
    """`COLUMNS` of all steps from the first on, 6 digits each."""
    evals: list[EvalRecord]
    changes: list[dict[str, Any]]
    """What its user accepted on the way, and after which step."""
    run: dict[str, Any]
    identity: Identity
    """What a run that goes on from its end would have to share with it."""
    about: dict[str, Any]
    """Where and how it was made: date, command, commit, card, versions, ranks."""
    selections: list[dict[str, Any]] = field(default_factory=list)
    """`SelectionRecord`s of a run that diagnoses its layers, 4 digits each."""

    @classmethod
    def of(
        cls, run: Run, arm: str, history: History, identity: Identity, about: dict[str, Any]
    ) -> "ArmResult":
        """Return the result of `run`'s `arm` with the records of all its steps."""
        names = groupby(record.stage for record in history.steps)
        return cls(
            recipe=run.name,
            seed=run.seed,
            arm=arm,
            stages=[(name, len(list(steps))) for name, steps in names],
            columns={c: [short(getattr(r, c)) for r in history.steps] for c in COLUMNS},
            evals=[EvalRecord(r.step, r.stage, r.mode, short(r.loss)) for r in history.evals],
            changes=[asdict(change) for change in history.changes],
            run=asdict(run),
            identity=identity,
            about=about,
            selections=[
                {k: short(v, 4) if isinstance(v, float) else v for k, v in asdict(one).items()}
                for one in history.selections
            ],
        )

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "ArmResult":
        """Return the result that `asdict` made `record` of."""
        evals = [EvalRecord(**item) for item in record["evals"]]
        stages = [(name, steps) for name, steps in record["stages"]]
        return cls(**record | {"evals": evals, "stages": stages})


def short(value: float, digits: int = 6) -> float:
    """Return a number with so many significant digits."""
    return float(f"{value:.{digits}g}")


def about_this(device: torch.device) -> dict[str, Any]:
    """Return date, command, commit, card, versions and ranks of this process."""
    cuda = device.type == "cuda"
    facts = {
        "date": time.strftime("%F"),
        "command": shlex.join(sys.argv),
        "commit": commit(),
        "card": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "world_size": dist.get_world_size(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    more = {"cudnn": torch.backends.cudnn.version(), "triton": installed("triton")} if cuda else {}
    return facts | more


def path_of(folder: Path, recipe: str, seed: int) -> Path:
    """Return the results file of one seed."""
    return folder / f"{recipe}_seed{seed}.jsonl"


def read(path: Path) -> dict[str, ArmResult]:
    """Return the finished arms in a results file by name; none where there is no file.

    Raises:
        ValueError: a line is not a result; the message says which.
    """
    found = {}
    lines = path.read_text().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            result = ArmResult.from_json(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number}: no line that recover.py wrote ({error}); remove the line, and "
                "recover.py writes it again from the checkpoints"
            ) from error
        found[result.arm] = result
    return found


def add(path: Path, result: ArmResult) -> None:
    """Add a finished arm to a results file, in place of what had its name; all or nothing."""
    results = read(path) | {result.arm: result}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(asdict(r)) + "\n" for r in results.values()))


def write_whole(path: Path, text: str) -> None:
    """Write a file of results, in place of what had its name; all or nothing."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


def find(places: Iterable[Path]) -> list[Path]:
    """Return the results files that are named, and those in the folders that are.

    Raises:
        FileNotFoundError: a place is not there, or a folder has none.
    """
    found: list[Path] = []
    for place in places:
        files = sorted(place.glob("*_seed*.jsonl")) if place.is_dir() else [place]
        if not files or not files[0].is_file():
            raise FileNotFoundError(f"{place}: no results of recover.py (NAME_seed0.jsonl)")
        found += files
    return found


def merge(paths: Sequence[Path]) -> list[ArmResult]:
    """Return the results of several files, by seed, in the order that they were finished in.

    A line that two files have counts once.

    Raises:
        ValueError: two files tell differently of one arm of a seed, results are of different
            experiments, or arms of a seed of different texts.
    """
    merged: dict[tuple[int, str], ArmResult] = {}
    for path in paths:
        for name, result in read(path).items():
            known = merged.setdefault((result.seed, name), result)
            if known != result:
                raise ValueError(
                    f"{path}: seed {result.seed}, {name}: another file has other results of the "
                    "same arm; name one of them, or give each repetition a seed of its own"
                )
    results = sorted(merged.values(), key=lambda result: result.seed)
    for result in results:
        check_alike(results[0], result)
        texts = {r.identity["data.files"] for r in results if r.seed == result.seed}
        if len(texts) > 1:
            raise ValueError(f"seed {result.seed}: its arms read different texts (data.files)")
    return results


def check_alike(one: ArmResult, other: ArmResult) -> None:
    """Raise a ValueError that names what differs, unless both are of one experiment."""
    a, b = (ADDED | r.identity | {"recipe": r.recipe} for r in (one, other))
    free = ("seed", "stages", "data.files")
    differs = [name for name in {**a, **b} if name not in free and a.get(name) != b.get(name)]
    if differs:
        said = "; ".join(f"{name}: {a.get(name)} and {b.get(name)}" for name in differs)
        raise ValueError(
            f"seed {one.seed}, {one.arm} and seed {other.seed}, {other.arm} are of different "
            f"experiments: {said}; draw each on its own"
        )
