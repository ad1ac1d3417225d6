"""Training of the short stage: once for each seed, by whoever comes first."""

import time
from collections.abc import Callable
from typing import Protocol

import torch.distributed as dist

from lhcp.training import checkpoint, recovery_results
from lhcp.training.data import TrainingData, open_data
from lhcp.training.history import Watcher
from lhcp.training.identity import identity
from lhcp.training.lock import FolderInUse, held
from lhcp.training.loop import train
from lhcp.training.parallel import build, compute_dtype
from lhcp.training.process import Process
from lhcp.training.recovery_results import ArmResult
from lhcp.training.run import SLOW, Run

SHORT = "short"
"""Name of its stage."""
RESULT, ANSWERS = "result.jsonl", "passkey.json"
"""Files beside its checkpoints: its result, and what its model answered, if it was asked."""


class Teller(Watcher, Protocol):
    """A watcher that can also be told in words."""

    def say(self, text: str) -> None:
        """Print a line that stays."""


def train_short(
    run: Run,
    own: Process,
    teller: Teller,
    opened: Callable[..., TrainingData] = open_data,
) -> None:
    """Train the short stage of a run, if it has one that is not done; every rank calls it.

    Of several processes that share it one trains, and the others wait. `opened` is asked for the
    text, as `open_data` is.

    Raises:
        ValueError: its folder has checkpoints of another run.
        FloatingPointError: a loss or gradient is not finite.
    """
    if run.short_checkpoint is None:
        return
    told = False
    while checkpoint.latest(run.short_folder) != run.short_checkpoint:
        own.marks.at("start", patience=SLOW)
        try:
            with held(run.short_folder) as remark:
                if remark:
                    teller.say(remark)
                train_held(run, own, teller, opened)
        except FolderInUse as error:
            if not told:
                teller.say(f"waits for the short stage: {error}")
            told = True
            time.sleep(1)


def train_held(run: Run, own: Process, teller: Teller, opened: Callable[..., TrainingData]) -> None:
    """Train it from its newest checkpoint on, with its folder held; write its result."""
    short, stages = run.short_run, run.short_stages
    data = opened(short.data, short.seqlen, short.seed, short.shortest_document)
    teller.say(
        f"seed {run.seed}, short stage: {run.short.steps:,} steps of {short.global_batch} x "
        f"{short.seqlen:,} tokens"
    )
    trainee = build(short, own.device, own.marks)
    history = train(short, trainee, data, stages, run.short_folder, teller)
    if own.rank == 0:
        dtype = compute_dtype(short, own.device)
        whole = identity(short, stages, data.manifest, dtype, short.dense_steps)
        about = recovery_results.about_this(own.device)
        path = run.short_folder / RESULT
        recovery_results.add(path, ArmResult.of(short, SHORT, history, whole, about))
    dist.barrier()
