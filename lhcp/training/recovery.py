"""Does a model recover? Dense from scratch, and splits that share one lighthouse stage, by seed."""

import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from lhcp.training import recovery_results
from lhcp.training.checkpoint import Sharing
from lhcp.training.data import TrainingData, open_data
from lhcp.training.files import Manifest
from lhcp.training.history import History, Watcher
from lhcp.training.identity import Identity, accepted_changes, identity
from lhcp.training.loop import train
from lhcp.training.parallel import build, compute_dtype
from lhcp.training.process import Process
from lhcp.training.recovery_results import ArmResult
from lhcp.training.run import Run
from lhcp.training.run_checks import check_run
from lhcp.training.short_stage import Teller, train_short
from lhcp.training.stages import Stage, total_steps

DENSE, LIGHTHOUSE = "dense", "lighthouse"
Part = Literal["all", "dense", "splits"]
"""Of a seed's arms: all, dense from scratch alone, or the lighthouse stage and its splits alone."""


@dataclass(frozen=True)
class Split:
    """How many steps a two-stage run attends sparsely, and then densely."""

    lighthouse: int
    dense: int

    @classmethod
    def parse(cls, text: str) -> "Split":
        """Return the split that "1350+1350" names.

        Raises:
            ValueError: it is not two positive numbers.
        """
        steps = [int(p) if p.isascii() and p.isdigit() else 0 for p in text.split("+")]
        if len(steps) != 2 or min(steps) < 1:
            raise ValueError(
                f"splits: {text!r}: must be lighthouse steps, a plus and dense steps, each at "
                "least 1, for example 1350+1350"
            )
        return cls(*steps)

    @property
    def name(self) -> str:
        """Return what `parse` reads."""
        return f"{self.lighthouse}+{self.dense}"

    @property
    def total(self) -> int:
        """Return the steps of both stages."""
        return self.lighthouse + self.dense


@dataclass(frozen=True)
class Arm:
    """A training run of a seed: what it does, and which steps it shares."""

    name: str
    stages: tuple[Stage, ...]
    marks: frozenset[int] = frozenset()
    """Steps whose checkpoint is kept, and which are evaluated."""
    begin: int | None = None
    """Step of the lighthouse stage that it begins from; None: from scratch."""

    def sharing(self, folder: Path, weights: Path | None) -> Sharing:
        """Return what `train` needs for this, given the seed's folder and its short stage."""
        if self.begin is None:
            return Sharing(None, self.marks, weights)
        return Sharing(folder / LIGHTHOUSE / f"step-{self.begin:08d}", self.marks)


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """An experiment: a run, the splits of its steps, and the seeds to do all of that with."""

    run: Run
    """Its numbers of steps and its seed are the splits' and the seeds'."""
    splits: tuple[str, ...]
    seeds: tuple[int, ...]
    part: Part = "all"
    """Which of a seed's arms; parts can be done side by side, each in a folder of its own."""

    @property
    def arms(self) -> tuple[Arm, ...]:
        """Return the arms of one seed: dense, the lighthouse stage, then each split."""
        splits = [Split.parse(text) for text in self.splits]
        totals = frozenset(s.total for s in splits)
        switches = frozenset(s.lighthouse for s in splits)
        dense = Stage(name="baseline", mode="dense", steps=max(totals))
        longest = Stage(name="lighthouse", mode="lighthouse", steps=max(switches))
        from_scratch = (Arm(DENSE, (dense,), totals),)
        in_two_stages = (
            Arm(LIGHTHOUSE, (longest,), switches),
            *(
                Arm(split.name, self.run_of(split.name).stages, begin=split.lighthouse)
                for split in splits
            ),
        )
        parts = {"dense": from_scratch, "splits": in_two_stages}
        return parts.get(self.part) or (*from_scratch, *in_two_stages)

    def run_of(self, arm: str, seed: int = 0) -> Run:
        """Return the run with a seed and the steps of an arm."""
        splits = [Split.parse(text) for text in self.splits]
        steps = {
            DENSE: Split(0, max(s.total for s in splits)),
            LIGHTHOUSE: Split(max(s.lighthouse for s in splits), 0),
        }.get(arm) or Split.parse(arm)
        return replace(
            self.run, seed=seed, lighthouse_steps=steps.lighthouse, dense_steps=steps.dense
        )

    def check(self, world_size: int) -> None:
        """Check that everything fits before anything starts.

        Raises:
            ValueError: a split is none, something is named twice, the rate depends on the number
                of steps, or the run does not fit on the ranks.
        """
        for name, values in (("splits", self.splits), ("seeds", self.seeds)):
            twice = [value for value, count in Counter(values).items() if count > 1]
            if twice or not values:
                raise ValueError(f"{name}={values}: must be at least one, none of them twice")
        splits = [Split.parse(text) for text in self.splits]
        if len({s.name for s in splits}) < len(splits):
            raise ValueError(f"splits={self.splits}: two of them are the same")
        if min(self.seeds) < 0:
            raise ValueError(f"seeds={self.seeds}: must not be negative")
        if self.run.optim.decay != "constant":
            raise ValueError(
                f"optim.decay={self.run.optim.decay!r}: the rate of each step then follows from "
                "the number of all steps, so that splits cannot share a lighthouse stage; take "
                "'constant', or train each split with lhcp train"
            )
        run = self.run
        if run.seed or run.lighthouse_steps or run.dense_steps or run.baseline:
            raise ValueError(
                "seed, lighthouse_steps, dense_steps, baseline: an experiment has --seeds, "
                "--splits and --part in their place"
            )
        check_run(run, world_size)


def seed_folder(run: Run, seed: int) -> Path:
    """Return the folder of one seed's checkpoints; its results lie beside the folder."""
    return run.folder / f"seed{seed}"


def finished(path: Path) -> dict[str, ArmResult]:
    """Return what `read` finds, on every rank what rank 0 finds."""
    found = [recovery_results.read(path) if dist.get_rank() == 0 else {}]
    dist.broadcast_object_list(found)
    return found[0]


def recover_seed(
    recovery: Recovery,
    seed: int,
    own: Process,
    teller: Teller,
    opened: Callable[..., TrainingData] = open_data,
) -> None:
    """Do all arms of one seed that are not done; write each one's result when it ends.

    Every rank calls it, with the seed's folder held. Cut at any moment and called again it goes on
    from the newest checkpoint. `opened` is asked for the text, as `open_data` is: whoever does many
    of the same text need not read all of it each time.

    Raises:
        ValueError: the folder has another experiment's checkpoints or results.
        FloatingPointError: a loss or gradient is not finite.
    """
    folder = seed_folder(recovery.run, seed)
    path = recovery_results.path_of(recovery.run.folder, recovery.run.name, seed)
    data = opened(recovery.run.data, recovery.run.seqlen, seed, recovery.run.shortest_document)
    for arm in recovery.arms:
        run = recovery.run_of(arm.name, seed)
        done = finished(path)
        if arm.name in done and is_done(done[arm.name], arm, run, own, data.manifest):
            # The stage's checkpoints may have been left on another machine.
            rest = [a for a in recovery.arms if a.begin and a.name not in done]
            if arm.name != LIGHTHOUSE or not rest or (folder / LIGHTHOUSE).exists():
                teller.say(f"seed {seed}, {arm.name}: done before")
                continue
        if arm.begin is None:
            train_short(run, own, teller, opened)
        teller.say(f"seed {seed}, {arm.name}: {total_steps(arm.stages):,} steps")
        history = train_arm(arm, run, own, data, teller)
        if own.rank == 0:
            whole = identity_after(arm, run, own, data.manifest, total_steps(arm.stages))
            about = recovery_results.about_this(own.device)
            recovery_results.add(path, ArmResult.of(run, arm.name, history, whole, about))
        dist.barrier()


def train_arm(arm: Arm, run: Run, own: Process, data: TrainingData, teller: Watcher) -> History:
    """Train one arm, from its newest checkpoint on, in a process as if it were fresh."""
    # Else the arms before this one count towards the compiler's limit of versions of a layer.
    torch.compiler.reset()
    gc.collect()
    folder = seed_folder(run, run.seed)
    trainee = build(run, own.device, own.marks)
    sharing = arm.sharing(folder, run.short_checkpoint)
    return train(run, trainee, data, arm.stages, folder / arm.name, teller, sharing)


def identity_after(arm: Arm, run: Run, own: Process, manifest: Manifest, done: int) -> Identity:
    """Return the identity of an arm's run after `done` steps."""
    return identity(run, arm.stages, manifest, compute_dtype(run, own.device), done)


def is_done(before: ArmResult, arm: Arm, run: Run, own: Process, manifest: Manifest) -> bool:
    """Tell whether a result is the arm's, or the arm's with fewer steps.

    Raises:
        ValueError: it is of another run; the message names what differs.
    """
    steps = sum(count for _, count in before.stages)
    now = identity_after(arm, run, own, manifest, steps)
    try:
        accepted_changes(before.identity, now, run.accept, steps, details="other contents")
    except ValueError as error:
        raise ValueError(f"seed {run.seed}, {arm.name}, which is finished: {error}") from error
    return steps == total_steps(arm.stages)
