"""One training step and one evaluation, on any mesh the same."""

import math
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from lhcp.comm.trail import Calls, calls_in
from lhcp.comm.whereabouts import calls_in_words
from lhcp.layer.mode import set_mode
from lhcp.layer.module import Mode
from lhcp.training.bad_numbers import first_not_finite
from lhcp.training.efficiency import peak_gib, utilization
from lhcp.training.history import StepRecord
from lhcp.training.parallel import Trainee
from lhcp.training.placement import Placement
from lhcp.training.run import SLOW, Run
from lhcp.training.sequences import IGNORED, Batch, Sequences
from lhcp.training.stages import Stage, stage_at, total_steps
from lhcp.training.stopping import Stop
from lhcp.training.tensor_parallel import is_cut
from lhcp.training.together import gather


def sum_over_ranks(values: Sequence[float | Tensor], device: torch.device) -> list[float]:
    """Return each value summed over all ranks, in float64 on the way."""
    # A number is filled in and not copied, which would wait for the GPU once each.
    scalars = [
        v.double()
        if isinstance(v, Tensor)
        else torch.full((), v, dtype=torch.float64, device=device)
        for v in values
    ]
    total = torch.stack(scalars)
    dist.all_reduce(total)
    return total.tolist()


def mine(whole: Tensor, placement: Placement) -> Tensor:
    """Return this rank's tokens of whole sequences [B, N] in layout order, on its device.

    The host does not wait for a GPU that is still at something else.
    """
    if placement.device.type == "cuda":
        whole = whole.pin_memory()
    return whole.to(placement.device, non_blocking=True)[:, placement.positions]


def loss_sum(trainee: Trainee, batch: Batch) -> Tensor:
    """Return the summed cross-entropy of this rank's part of whole sequences, in fp32."""
    placement, cu_seqlens = trainee.placement, batch.cu_seqlens
    given, target = (mine(whole, placement) for whole in (batch.tokens, batch.labels))
    positions = placement.rope_positions(batch.tokens.shape[1], cu_seqlens)
    logits = trainee.model(given, positions, cu_seqlens).float().flatten(0, 1)
    return F.cross_entropy(logits, target.flatten(), reduction="sum", ignore_index=IGNORED)


def backward(run: Run, trainee: Trainee, data: Sequences, step: int) -> Tensor:
    """Add the gradients of step `step` and return this rank's share of its loss, a scalar.

    The shares of all ranks add up to the mean over all bytes that the global batch asks for, and so
    do the gradients, because FSDP sums them: whatever the mesh, it is the same step. Ranks that cut
    layers among them have the same share, which counts once.
    """
    placement = trainee.placement
    batch = data.batch(step, placement.dp_rank, placement.dp_size, run.global_batch)
    num_labels = data.size(step, run.global_batch).num_labels
    loss = torch.zeros((), device=placement.device)
    rows = len(batch.tokens) // run.accumulate
    for index in range(run.accumulate):
        trainee.sharded.set_requires_gradient_sync(index == run.accumulate - 1)
        trainee.marks.at("forward", step + 1)
        share = loss_sum(trainee, batch.rows(index * rows, (index + 1) * rows)) / num_labels
        trainee.marks.at("backward", step + 1)
        torch.autograd.backward(share)
        loss += share.detach()
    return loss


def own_gradients(trainee: Trainee) -> tuple[list[Tensor], list[Tensor]]:
    """Return this rank's shards of gradients: those of cut layers, and those equal over tp.

    They are plain tensors, which cost the host less.
    """
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for grad in (p.grad for p in trainee.model.parameters()):
        if grad is not None:
            shared = trainee.placement.tp_size > 1 and not is_cut(grad)
            found[shared].append(grad.to_local() if isinstance(grad, DTensor) else grad)
    return found


def squared_norm(grads: Sequence[Tensor]) -> Tensor | float:
    """Return the squared norm of all of them as one, in float64."""
    return torch.nn.utils.get_total_norm(grads).double().square() if grads else 0.0


def astray(placement: Placement, trail: int) -> tuple[float, float]:
    """Return two numbers that add up to 0 over the ranks of a sequence whose trails are equal.

    Ranks of other sequences may be given other documents, so the ranks' trails as they are cannot
    be told from one sum over all.
    """
    of_sequence = dist.get_world_size() // placement.dp_size
    weight = 1 - of_sequence if dist.get_rank() % of_sequence == 0 else 1
    return float(weight * trail), float(weight * trail * trail)


def check_trails(calls: Calls, sums: Sequence[float], step: int) -> None:
    """Check that the ranks of each sequence made the same attention calls in a step.

    Args:
        calls: this rank's so far, in the group that shares its sequence. With CUDA graphs nobody
            counts them.
        sums: of all ranks' `astray`, whose trails are below 2**12.

    Raises:
        ValueError: they did not, on all ranks of all sequences; it says who is where.
    """
    if any(sums):
        said = calls_in_words(dict(enumerate(gather(calls))))
        raise ValueError(
            f"step {step + 1}: {said}. Messages of equal sizes were read as others than they are: "
            "the step is not taken. Every rank must attend alike, whatever its data"
        )


def train_step(
    run: Run,
    trainee: Trainee,
    data: Sequences,
    stages: Sequence[Stage],
    step: int,
    stop: Stop | None = None,
    spike: float = math.inf,
) -> StepRecord:
    """Do step `step` (from 0) and return its record.

    `stop` is told how many ranks were asked to stop, with the sum that the loss needs anyway. A
    gradient whose norm is above `spike` is one.

    Raises:
        FloatingPointError: the loss or the gradient is not finite, or the gradient is a spike, on
            all ranks alike, and the run does not skip such steps; the weights are still those
            before the step. The message names the first tensor that is not finite, found by a
            second pass over the batch.
        ValueError: ranks of a sequence made different attention calls; as much.
    """
    begin = time.perf_counter()
    timers = trainee.timers
    if timers is not None:
        timers.reset()
    rate = run.optim.rate(step, total_steps(stages))
    for group in trainee.optimizer.param_groups:
        group["lr"] = rate
    trainee.optimizer.zero_grad()
    before = calls_in(trainee.placement.ranks.flat)
    share = backward(run, trainee, data, step)
    waited = 0.0 if timers is None else timers.rotation_share(1.0)
    asked = 0.0 if stop is None else stop.asked
    cut, shared = own_gradients(trainee)
    tp = trainee.placement.tp_size
    square = squared_norm(cut) + squared_norm(shared) / tp
    calls = calls_in(trainee.placement.ranks.flat)
    trails = astray(trainee.placement, calls.since(before) & 0xFFF)
    # The one point of a step at which the host waits for the GPU.
    shares = (share / tp, waited, asked, square, *trails)
    loss, waited, asked, square_sum, *sums = sum_over_ranks(shares, trainee.placement.device)
    check_trails(calls, sums, step)
    norm = math.sqrt(square_sum)
    if stop is not None:
        stop.hear(asked)
    stage = stage_at(stages, step).name
    finite = math.isfinite(loss) and math.isfinite(norm)
    skipped = not (finite and norm <= spike)
    if skipped and run.on_bad_step == "stop":
        found = f"step {step + 1} ({stage}): loss {loss}, gradient norm {norm}"
        lower = f"a lower --optim.lr (now {rate:g}) or more warm-up"
        if finite:
            raise FloatingPointError(
                f"{found}: a spike, above {spike:g}, which is {run.spike_factor:g} times the "
                "median of the stage's last steps; go on with --on-bad-step skip, which leaves out "
                f"up to three in a row, or with {lower}"
            )
        trainee.marks.at("search", step + 1, patience=SLOW)
        trainee.optimizer.zero_grad()
        where = first_not_finite(trainee.model, lambda: backward(run, trainee, data, step))
        # No rate has done anything yet.
        advice = f"go on with {lower}" if step else "see the text, the weights and the sizes"
        raise FloatingPointError(f"{found}: not finite; the first was {where}; {advice}")
    trainee.marks.at("optimiser", step + 1)
    if not skipped:
        if norm > run.optim.clip:
            torch._foreach_mul_(cut + shared, run.optim.clip / norm)
        trainee.optimizer.step()
    seconds = time.perf_counter() - begin
    tokens = run.global_batch * run.seqlen
    waited_share = None if timers is None else waited / dist.get_world_size() / seconds
    return StepRecord(
        step=step + 1,
        stage=stage,
        loss=loss,
        grad_norm=norm,
        lr=rate,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        rotation_share=waited_share,
        peak_gib=peak_gib(trainee.placement.device),
        mfu=utilization(run, stage_at(stages, step).mode, tokens / seconds, trainee.placement),
        documents=data.size(step, run.global_batch).num_documents,
        skipped=skipped,
    )


@torch.no_grad()
def evaluate(
    run: Run, trainee: Trainee, heldout: Sequences, mode: Mode, done: int | None = None
) -> float:
    """Return the mean loss over the first `eval_sequences` held-out sequences, nats per byte.

    `done` is the step after which, for the marks.
    """
    set_mode(trainee.model, mode)
    placement = trainee.placement
    batch = heldout.batch(0, placement.dp_rank, placement.dp_size, run.eval_sequences)
    rows = max(run.global_batch // placement.dp_size // run.accumulate, 1)
    total = torch.zeros((), device=placement.device)
    for start in range(0, len(batch.tokens), rows):
        # The first of a mode may compile.
        trainee.marks.at("evaluation", done, patience=SLOW)
        total += loss_sum(trainee, batch.rows(start, start + rows))
    # FSDP leaves the root gathered for a backward that does not come here.
    trainee.sharded.reshard()
    (loss,) = sum_over_ranks((total / placement.tp_size,), placement.device)
    return loss / heldout.size(0, run.eval_sequences).num_labels
