"""The training loop: one function a step, one for held-out text, one for the stages in order."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from lhcp.layer.mode import set_mode
from lhcp.layer.module import Mode
from lhcp.training import checkpoint
from lhcp.training.checkpoint import ALONE, Sharing
from lhcp.training.data import Sequences, TrainingData
from lhcp.training.identity import Change, Identity, accepted_changes, agree, identity
from lhcp.training.parallel import Placement, Trainee, compute_dtype
from lhcp.training.run import Run
from lhcp.training.shared_folder import prove_shared
from lhcp.training.stages import Stage, stage_at, total_steps
from lhcp.training.stopping import Stop, Stopped, stoppable


@dataclass(frozen=True)
class StepRecord:
    """What one training step did."""

    step: int
    """Number of the step, from 1."""
    stage: str
    loss: float
    """Mean over all tokens of the global batch, nats per byte, before the step."""
    grad_norm: float
    """Norm of the whole gradient, before clipping."""
    lr: float
    seconds: float
    tokens_per_second: float
    rotation_share: float | None
    """Share of the step that a rank waited in rotations, mean over ranks; None: not timed."""


@dataclass(frozen=True)
class EvalRecord:
    """What one evaluation on the held-out text found."""

    step: int
    """Steps done."""
    stage: str
    """The stage of the last step done."""
    mode: Mode
    """How the layers attended in this evaluation."""
    loss: float
    """Mean over the held-out tokens, nats per byte."""


@dataclass
class History:
    """All records of a run, in order; resuming restores it."""

    steps: list[StepRecord] = field(default_factory=list)
    evals: list[EvalRecord] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    """What differs from the run as it was started, by its user's word."""

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "History":
        """Return the history that `asdict` made `record` of."""
        return cls(
            [StepRecord(**item) for item in record["steps"]],
            [EvalRecord(**item) for item in record["evals"]],
            [Change(**item) for item in record.get("changes", [])],
        )


class Watcher(Protocol):
    """Is told of a run as it happens, on every rank."""

    def on_start(self, done: int, folder: Path) -> None:
        """Hear that the run begins; `done` steps were restored from `folder`."""

    def on_passed_over(self, said: str) -> None:
        """Hear that a checkpoint is damaged, and why the one before it is tried."""

    def on_step(self, record: StepRecord, stages: Sequence[Stage]) -> None:
        """Hear of a step that is done."""

    def on_eval(self, record: EvalRecord) -> None:
        """Hear of an evaluation."""


def sum_over_ranks(values: Sequence[float | Tensor], device: torch.device) -> list[float]:
    """Return each value summed over all ranks, in float64 on the way."""
    total = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in values])
    dist.all_reduce(total)
    return total.tolist()


def mine(whole: Tensor, placement: Placement) -> Tensor:
    """Return this rank's tokens of whole sequences [B, N] in layout order, on its device."""
    return whole.to(placement.device)[:, placement.positions]


def loss_sum(trainee: Trainee, tokens: Tensor, labels: Tensor) -> Tensor:
    """Return the summed cross-entropy of this rank's part of whole sequences [B, N], in fp32."""
    logits = trainee.model(mine(tokens, trainee.placement), trainee.placement.positions)
    target = mine(labels, trainee.placement)
    return F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="sum")


def backward(run: Run, trainee: Trainee, data: Sequences, step: int) -> Tensor:
    """Add the gradients of step `step` and return this rank's share of its loss, a scalar.

    The shares of all ranks add up to the mean over all tokens of the global batch, and so do the
    gradients, because FSDP sums them: whatever the mesh, it is the same step.
    """
    placement = trainee.placement
    tokens, labels = data.batch(step, placement.dp_rank, placement.dp_size, run.global_batch)
    loss = torch.zeros((), device=placement.device)
    parts = zip(tokens.chunk(run.accumulate), labels.chunk(run.accumulate), strict=True)
    for index, (part, target) in enumerate(parts):
        trainee.sharded.set_requires_gradient_sync(index == run.accumulate - 1)
        share = loss_sum(trainee, part, target) / (run.global_batch * run.seqlen)
        torch.autograd.backward(share)
        loss += share.detach()
    return loss


def clip(trainee: Trainee, limit: float) -> float:
    """Shorten the gradient of all ranks to norm `limit`; return its norm before."""
    norm = torch.nn.utils.clip_grad_norm_(trainee.model.parameters(), limit)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def train_step(
    run: Run,
    trainee: Trainee,
    data: Sequences,
    stages: Sequence[Stage],
    step: int,
    stop: Stop | None = None,
) -> StepRecord:
    """Do step `step` (from 0) and return its record.

    `stop` is told how many ranks were asked to stop, with the sum that the loss needs anyway.

    Raises:
        FloatingPointError: the loss or the gradient is not finite, on all ranks alike; the weights
            are still those before the step.
    """
    begin = time.perf_counter()
    timers = trainee.timers
    if timers is not None:
        timers.reset()
    rate = run.optim.rate(step, total_steps(stages))
    for group in trainee.optimizer.param_groups:
        group["lr"] = rate
    trainee.optimizer.zero_grad()
    share = backward(run, trainee, data, step)
    waited = 0.0 if timers is None else timers.rotation_share(1.0)
    asked = 0.0 if stop is None else stop.asked
    loss, waited, asked = sum_over_ranks((share, waited, asked), trainee.placement.device)
    if stop is not None:
        stop.hear(asked)
    norm = clip(trainee, run.optim.clip)
    stage = stage_at(stages, step).name
    if not torch.tensor((loss, norm)).isfinite().all():
        raise FloatingPointError(
            f"step {step + 1} ({stage}): loss {loss}, gradient norm {norm}: not finite; resume "
            f"from the last checkpoint with a lower --optim.lr (now {rate:g}) or more warm-up"
        )
    trainee.optimizer.step()
    seconds = time.perf_counter() - begin
    tokens = run.global_batch * run.seqlen
    waited_share = None if timers is None else waited / dist.get_world_size() / seconds
    return StepRecord(step + 1, stage, loss, norm, rate, seconds, tokens / seconds, waited_share)


@torch.no_grad()
def evaluate(run: Run, trainee: Trainee, heldout: Sequences, mode: Mode) -> float:
    """Return the mean loss over the first `eval_sequences` held-out sequences, nats per byte."""
    set_mode(trainee.model, mode)
    placement = trainee.placement
    tokens, labels = heldout.batch(0, placement.dp_rank, placement.dp_size, run.eval_sequences)
    rows = max(run.global_batch // placement.dp_size // run.accumulate, 1)
    total = torch.zeros((), device=placement.device)
    for part, target in zip(torch.split(tokens, rows), torch.split(labels, rows), strict=True):
        total += loss_sum(trainee, part, target)
    # FSDP leaves the root gathered for a backward that does not come here.
    trainee.sharded.reshard()
    (loss,) = sum_over_ranks((total,), placement.device)
    return loss / (run.eval_sequences * run.seqlen)


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
    """
    with stoppable() as stop:
        return train_until(stop, Training(run, trainee, data, stages), folder, watcher, sharing)


def train_until(
    stop: Stop, training: Training, folder: Path, watcher: Watcher, sharing: Sharing
) -> History:
    """Do what `train` does, until the end or until `stop` is asked for."""
    run, trainee, data, stages = training.run, training.trainee, training.data, training.stages
    agree(run, data.manifest)
    prove_shared(folder)
    resumed = [(0, History())]

    def take(path: Path) -> None:
        resumed.append(resume(training, path))

    checkpoint.take_newest(folder, sharing.begin, watcher.on_passed_over, take)
    done, history = resumed[-1]
    watcher.on_start(done, folder)
    end = total_steps(stages)
    while done < end:
        stage = stage_at(stages, done)
        set_mode(trainee.model, stage.mode)
        record = train_step(run, trainee, data.train, stages, done, stop)
        history.steps.append(record)
        watcher.on_step(record, stages)
        done += 1
        stage_ends = done == end or stage_at(stages, done) is not stage
        marked = done in sharing.marks
        if stage_ends or marked or done % run.eval_every == 0:
            modes: tuple[Mode, ...] = ("lighthouse", "dense")
            for mode in modes if stage.mode == "lighthouse" else modes[1:]:
                loss = evaluate(run, trainee, data.heldout, mode)
                history.evals.append(EvalRecord(done, stage.name, mode, loss))
                watcher.on_eval(history.evals[-1])
        stops = stop.agreed is not None
        if done == end or marked or stops or done % run.checkpoint_every == 0:
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
