"""What do sizes do? One change at a time from a run, each trained as a recovery of one split."""

import json
import re
import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated

import torch.distributed as dist
import tyro

from lhcp.training.data import TrainingData, open_data
from lhcp.training.identity import MAY_CHANGE
from lhcp.training.lock import FolderInUse, held
from lhcp.training.process import Process
from lhcp.training.recovery import Recovery, recover_seed, seed_folder
from lhcp.training.recovery_results import write_whole
from lhcp.training.retrieval import Asked, Found, retrieve
from lhcp.training.run import Run
from lhcp.training.short_stage import ANSWERS, Teller, train_short

BASE = "base"
"""Folder of the run without a change."""


@dataclass(frozen=True)
class Knob:
    """One change of the run, and what is trained with it."""

    name: str
    """Its folder."""
    recovery: Recovery


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """An experiment: a run, one split of its steps, and changes of the run, one at a time."""

    run: Annotated[Run, tyro.conf.arg(name="")]
    split: str
    """Lighthouse steps + dense steps of each run."""
    seeds: tuple[int, ...]
    """Seeds of weights and of the order of data; all knobs of the first come first."""
    knobs: tuple[str, ...]
    """Changes, in the order that they are done in: flags of the run without their dashes, with a
    comma between, as "lighthouse.pool-factor 8, lighthouse.topk 256"; "" is the run as it is."""
    contexts: tuple[int, ...] = ()
    """Bytes of the passkey texts that each model is asked at its end; none: it is not asked."""

    @property
    def turned(self) -> list[Knob]:
        """Return the run with each change, in order.

        Raises:
            ValueError: a knob is no flags of the run.
        """
        return [self.turn(flags) for flags in self.knobs]

    def turn(self, flags: str) -> Knob:
        """Return the run with the change that flags of it make."""
        words = [
            word for flag in flags.split(",") if flag for word in shlex.split(f"--{flag.strip()}")
        ]
        try:
            run = tyro.cli(Run, default=self.run, args=words, prog="a knob")
        except SystemExit as error:
            raise ValueError(
                f"knobs: {flags!r}: must be flags of the run without dashes, for example "
                "'lighthouse.topk 256'"
            ) from error
        name = re.sub(r"[^A-Za-z0-9.]+", "-", flags).strip("-") or BASE
        # All begin from one short stage.
        short = replace(run.short, out=self.run.short.out or str(self.run.folder))
        run = replace(run, short=short, out=str(self.run.folder / name))
        return Knob(name, Recovery(run=run, splits=(self.split,), seeds=self.seeds, part="splits"))

    def check(self, world_size: int) -> None:
        """Check that everything fits before anything starts.

        Raises:
            ValueError: a knob is no flags, two have one name, or a run does not fit.
        """
        turned = self.turned
        twice = [n for n, count in Counter(k.name for k in turned).items() if count > 1]
        if twice or not turned:
            raise ValueError(f"knobs={self.knobs}: must be at least one, none of them twice")
        for knob in turned:
            knob.recovery.check(world_size)
            check_short(self.run, knob)
        if self.contexts:
            for knob in turned:
                self.asked.check(knob.recovery.run)

    @property
    def asked(self) -> Asked:
        """Return what each model is asked at its end, densely."""
        return Asked(contexts=self.contexts, batch=self.run.global_batch)


def check_short(run: Run, knob: Knob) -> None:
    """Check that a knob's short stage is the run's.

    Raises:
        ValueError: it changes what is trained there; the message names what.
    """
    if not (run.short.steps or knob.recovery.run.short.steps):
        return
    before, now = (asdict(one.short_run) for one in (run, knob.recovery.run))
    differs = [n for n in now if n not in MAY_CHANGE and before[n] != now[n]]
    if differs or run.short.steps != knob.recovery.run.short.steps:
        raise ValueError(
            f"knob {knob.name}: changes {', '.join(differs) or 'steps'} of the short stage, which "
            "all knobs share; give it an experiment of its own (another --out)"
        )


def answers_of(run: Run, seed: int) -> Path:
    """Return the file of a model's answers; results of its training lie beside it."""
    return run.folder / f"passkey_seed{seed}.json"


def turn_knobs(knobs: Knobs, own: Process, teller: Teller) -> None:
    """Do what is not done and what no other process is doing: all knobs, seed by seed.

    Every rank calls it. Several processes, each with its own device, share the work when all are
    started alike: each takes the next one that nobody holds.

    Raises:
        ValueError: a folder has another experiment's checkpoints or results.
        FloatingPointError: a loss or gradient is not finite.
    """
    opened = cache(open_data)
    for seed in knobs.seeds:
        ask_short(knobs, seed, own, teller, opened)
        for knob in knobs.turned:
            teller.say(f"knob {knob.name}, seed {seed}")
            try:
                with held(seed_folder(knob.recovery.run, seed)) as remark:
                    if remark:
                        teller.say(remark)
                    turn_one(knobs, knob, seed, own, teller, opened)
            except FolderInUse as error:
                teller.say(f"passed over: {error}")


def ask_short(
    knobs: Knobs, seed: int, own: Process, teller: Teller, opened: Callable[..., TrainingData]
) -> None:
    """Train one seed's short stage, and ask it the contexts that it can know."""
    (first, *_) = knobs.turned
    run = first.recovery.run_of(knobs.split, seed)
    contexts = tuple(c for c in knobs.contexts if c <= run.short.seqlen)
    if run.short_checkpoint is None:
        return
    train_short(run, own, teller, opened)
    if contexts:
        place = run.short_checkpoint
        ask_once(
            place,
            run.short_folder / ANSWERS,
            replace(knobs.asked, contexts=contexts),
            own,
            teller,
        )


def ask_once(place: Path, path: Path, asked: Asked, own: Process, teller: Teller) -> None:
    """Ask the model at `place`, if its answers are not in the file `path`, and write them."""
    there = [path.exists()]
    dist.broadcast_object_list(there)
    if there[0]:
        return
    found = retrieve(place, asked, own.device)
    teller.say(f"passkey: {found.mean:.3f} of {len(asked.contexts)} contexts")
    if own.rank == 0:
        write_whole(path, json.dumps(found.to_json()))


def turn_one(
    knobs: Knobs,
    knob: Knob,
    seed: int,
    own: Process,
    teller: Teller,
    opened: Callable[..., TrainingData],
) -> None:
    """Train one knob's run with one seed, and ask it, with its folder held."""
    recovery = knob.recovery
    recover_seed(recovery, seed, own, teller, opened)
    if knobs.contexts:
        place = seed_folder(recovery.run, seed) / knobs.split
        ask_once(place, answers_of(recovery.run, seed), knobs.asked, own, teller)


def read_answers(run_folder: Path) -> dict[int, Found]:
    """Return what the models of a knob answered, by seed."""
    return {
        int(path.stem.removeprefix("passkey_seed")): Found.from_json(json.loads(path.read_text()))
        for path in sorted(run_folder.glob("passkey_seed*.json"))
    }
