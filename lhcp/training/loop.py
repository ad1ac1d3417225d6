"""The training loop: from the newest checkpoint through the stages in order."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lhcp.layer.mode import set_mode
from lhcp.layer.module import Mode
from lhcp.training import checkpoint
from lhcp.training.checkpoint import ALONE, Sharing
from lhcp.training.data import TrainingData
from lhcp.training.history import EvalRecord, History, Watcher
from lhcp.training.identity import Identity, accepted_changes, agree, identity
from lhcp.training.parallel import Trainee, compute_dtype
from lhcp.training.run import SLOW, Run
from lhcp.training.selection_log import diagnose_layers
from lhcp.training.shared_folder import prove_shared
from lhcp.training.spikes import spike_limit
from lhcp.training.stages import Stage, stage_at, total_steps
from lhcp.training.step import evaluate, train_step
from lhcp.training.stopping import Stop, Stopped, stoppable

FIRST_STEPS = 3
"""Of a stage: in them layers are compiled, kernels tuned and graphs recorded."""
BAD_STEPS = 3
"""Steps in a row that may be skipped."""


@dataclass(frozen=True)
class Training:
    """What is trained: the run, what it changes, its text and its stages."""

    run: Run
    trainee: Trainee
    data: TrainingData
    stages: Sequence[Stage]

    def identity(self, done: int) -> Identity:
        """Return what a checkpoint after `done` steps must share with whoever goes on."""
        dtype = compute_dtype(self.run, self.trainee.placement.device)
        return identity(self.run, self.stages, self.data.manifest, dtype, done)

    def beside(self, done: int, history: History) -> dict[str, Any]:
        """Return what a checkpoint after `done` steps has beside the tensors."""
        files = self.data.manifest.to_json()
        return {"identity": self.identity(done), "files": files, "history": asdict(history)}


def resume(training: Training, found: Path) -> tuple[int, History]:
    """Load the checkpoint `found`; return the steps done and their history.

    Raises:
        ValueError: the checkpoint belongs to another run, and the run's `accept` does not say
            that it may; the message names what differs.
        RanksFailed: it cannot be loaded.
    """
    done, beside = checkpoint.read_beside(found)
    changes = accepted_changes(
        beside["identity"],
        training.identity(done),
        training.run.accept,
        done,
        details=training.data.manifest.changes(beside.get("files", [])),
    )
    checkpoint.load(found, training.trainee.model, training.trainee.optimizer)
    history = History.from_json(beside["history"])
    history.changes += changes
    return done, history


def train(
    run: Run,
    trainee: Trainee,
    data: TrainingData,
    stages: Sequence[Stage],
    folder: Path,
    watcher: Watcher,
    sharing: Sharing = ALONE,
) -> History:
    """Train through `stages` from the newest checkpoint in `folder` on, or from the start.

    Every rank calls it. The held-out text is evaluated every `eval_every` steps and at the end of
    each stage: densely, and after a lighthouse step in lighthouse mode too, on the same sequences.
    A run with `diagnose` looks at its layers' selections then, and before the first step.

    Args:
        run: The run.
        trainee: From `build`; trained in place.
        data: The text.
        stages: The stages in order; one optimiser and one order of data go through all of them.
        folder: Holds the checkpoints.
        watcher: Is told of everything as it happens.
        sharing: Where to begin if `folder` has no checkpoint, and steps after which the held-out
            text is evaluated and the checkpoint kept too.

    Raises:
        ValueError: the checkpoint belongs to another run, or the one to begin from is not whole;
            or ranks were started with different runs or see different files.
        FloatingPointError: as `train_step`; or weights are not finite when they are to be saved.
        NoCheckpointLeft: there are checkpoints, and all of them are damaged.
        FolderNotShared: a rank cannot write to `folder`, or sees another one there.
        SaveFailed: a checkpoint could not be written.
        Stopped: SIGTERM or SIGUSR1 came to a rank; the step in progress is done and saved.
        StoppedCompiling: it came, and ended a compiler that the step waited for; nothing is saved.
    """
    with stoppable() as stop:
        return train_until(stop, Training(run, trainee, data, stages), folder, watcher, sharing)


def train_until(
    stop: Stop, training: Training, folder: Path, watcher: Watcher, sharing: Sharing
) -> History:
    """Do what `train` does, until the end or until `stop` is asked for."""
    run, trainee, data, stages = training.run, training.trainee, training.data, training.stages
    marks = trainee.marks
    marks.at("start", patience=SLOW)
    agree(run, data.manifest)
    # Storage may show a file late, but not so late that the watchdog speaks first.
    prove_shared(folder, patience=min(20.0, SLOW * run.timeout / 2))
    resumed = [(0, History())]

    def take(path: Path) -> None:
        if path == sharing.weights:
            # What the short stage ends with; no step of this run is done.
            resume(replace(training, run=run.short_run, stages=run.short_stages), path)
        else:
            resumed.append(resume(training, path))

    begin = sharing.begin or sharing.weights
    checkpoint.take_newest(folder, begin, watcher.on_passed_over, take)
    done, history = resumed[-1]
    watcher.on_start(done, folder)
    end = total_steps(stages)
    settled = done + FIRST_STEPS
    if run.diagnose and done == 0 and end:
        mode = stage_at(stages, 0).mode
        history.selections += diagnose_layers(run, trainee, data.heldout, mode, 0)
    while done < end:
        stage = stage_at(stages, done)
        set_mode(trainee.model, stage.mode)
        marks.patience = SLOW if done < settled else 1.0
        # So many skipped ones in a row are not bad luck: the next one says what is wrong.
        last = history.steps[-BAD_STEPS:]
        hopeless = len(last) == BAD_STEPS and all(one.skipped for one in last)
        strict = replace(run, on_bad_step="stop") if hopeless else run
        try:
            spike = spike_limit(run.spike_factor, history.steps, stage.name)
            record = train_step(strict, trainee, data.train, stages, done, stop, spike)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}. {checkpoint.newest_in(folder)}") from error
        history.steps.append(record)
        watcher.on_step(record, stages)
        done += 1
        stage_ends = done == end or stage_at(stages, done) is not stage
        marked = done in sharing.marks
        if stage_ends or marked or done % run.eval_every == 0:
            modes: tuple[Mode, ...] = ("lighthouse", "dense")
            for mode in modes if stage.mode == "lighthouse" else modes[1:]:
                loss = evaluate(run, trainee, data.heldout, mode, done)
                history.evals.append(EvalRecord(done, stage.name, mode, loss))
                watcher.on_eval(history.evals[-1])
            if run.diagnose:
                marks.at("diagnosis", done, patience=SLOW)
                found = diagnose_layers(run, trainee, data.heldout, stage.mode, done)
                history.selections += found
        if stage_ends:
            settled = done + FIRST_STEPS
        stops = stop.agreed is not None
        if done == end or marked or stops or done % run.checkpoint_every == 0:
            marks.at("save", done, patience=SLOW)
            path = checkpoint.save(
                folder,
                done,
                trainee.model,
                trainee.optimizer,
                beside=training.beside(done, history),
                keep=run.keep_checkpoints,
                marks=sharing.marks,
            )
            if stop.agreed is not None:
                trainee.release()
                raise Stopped(done, path, stop.agreed)
    trainee.release()
    return history
