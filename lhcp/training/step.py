"""One training step and one evaluation, on any mesh the same."""

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from lhcp.layer.mode import set_mode
from lhcp.layer.module import Mode
from lhcp.training.data import Sequences
from lhcp.training.history import StepRecord
from lhcp.training.parallel import Placement, Trainee
from lhcp.training.run import Run
from lhcp.training.stages import Stage, stage_at, total_steps
from lhcp.training.stopping import Stop


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
