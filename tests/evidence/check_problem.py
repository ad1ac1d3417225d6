"""What check_ranks compares: one computation, on all ranks and on rank 0 alone.

Rank 0 computes the whole while the others wait on the host, and deals out what each rank's own
answer is compared with, so only rank 0 ever holds whole tensors.

Shapes: one sequence of N tokens, H query heads, Hk kv heads, D head_dim, zigzag on W ranks.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

import lhcp
from bench.common.problem import TENSORS, Answers, AttentionProblem
from lhcp import reference, reference_documents
from lhcp.comm.layout import make_layout
from lhcp.comm.mesh import Ranks
from lhcp.lighthouse.select import Selection
from lhcp.measure.rank_values import gathered
from tests.evidence.whole import Entries, whole_entries

T = TypeVar("T")


def select(problem: AttentionProblem, inputs: Answers, ranks: Ranks) -> Entries | None:
    """Return what these ranks select, in the whole sequence; None for dense attention."""
    if problem.config is None:
        return None
    q, k, *_ = inputs
    found = lhcp.select(q, k, config=problem.config, group=ranks, cu_seqlens=problem.cu_seqlens)
    chosen = Selection(*(x.cpu() for x in found))
    return whole_entries(chosen, problem, ranks)


def exact_answers(
    problem: AttentionProblem, inputs: Answers, entries: Entries | None
) -> tuple[Answers, float]:
    """Return the reference's answers in float64 from these rounded inputs and this selection.

    Returns:
        answers; the rounding error of a float32 lse of the largest size that occurs.
    """
    double = tuple(x.double() for x in inputs)
    q, k, v, _ = double
    bounds, docs = problem.cu_seqlens, None
    if bounds is not None:
        docs = reference_documents.documents(bounds, 1, problem.seqlen).to(q.device)
    if entries is None or problem.config is None:

        def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            of_heads = None if docs is None else docs[:, None].expand(-1, q.shape[2], -1)
            return reference.causal_attention(q, k, v, None, of_heads)

        answers = problem.answer(double, dense)
    else:
        config = problem.config
        selection = reference.ReferenceSelection(*(x.to(q.device) for x in entries))

        def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return reference.lighthouse_attention(
                q, k, v, config=config, selection=selection, cu_seqlens=bounds
            )

        answers = problem.answer(double, oracle)
        q, k, v = (reference.gather(x, selection, config, docs) for x in (q, k, v))
    _, lse = lhcp.ring_attention(q, k, v, backend="math", return_lse=True)
    return answers, torch.finfo(torch.float32).eps * lse.abs().max().item()


@dataclass(frozen=True)
class Own:
    """This rank's part of a problem and of what rank 0 computed alone."""

    problem: AttentionProblem
    inputs: Answers
    alone: Answers
    """One rank's answers in the problem's dtype."""
    exact: Answers | None
    """The reference's in float64, where it was asked for."""
    handed_on: float
    """Largest error of the float32 lse that ring steps merge by; relative, of each part."""
    entries: Entries | None
    """What one rank selected."""


def prepare(
    problem: AttentionProblem, ranks: Ranks, device: torch.device, backend: str, exact: bool
) -> Own:
    """Let rank 0 compute the whole alone, and deal it out; a collective.

    Args:
        backend: of rank 0's run in the problem's dtype.
        exact: also compute in float64, from the same rounded inputs and the same selection.

    Raises:
        RuntimeError: rank 0 could not, on every rank.
    """
    layout = make_layout("zigzag", ranks.world_size)
    inputs = problem.own(ranks, device)

    def compute() -> tuple[list[Answers], float, Entries | None]:
        whole = problem.inputs(range(layout.num_chunks), layout.num_chunks, device)
        chosen = select(problem, whole, Ranks())
        found, handed_on = [problem.answer(whole, backend=backend)], 0.0
        if exact:
            true, handed_on = exact_answers(problem, whole, chosen)
            found.append(true)
        return found, handed_on, chosen

    found: list[Answers] = []
    handed_on, chosen, error = 0.0, None, None
    if ranks.rank == 0:
        done, error = attempt(compute)
        if done is not None:
            found, handed_on, chosen = done
        if device.type == "cuda":
            torch.cuda.empty_cache()
    error, handed_on, chosen = gathered((error, handed_on, chosen), ranks)[0]
    if error is not None:
        raise RuntimeError(f"rank 0 alone, {problem.kind} of {problem.seqlen:,} tokens: {error}")
    like = (inputs[0], *inputs[:3])
    dealt = []
    for run in range(1 + exact):
        dtype = torch.float64 if run else problem.dtype
        whole = found[run] if found else (None,) * 4
        dealt.append(tuple(deal(x, own, dtype, ranks) for x, own in zip(whole, like, strict=True)))
    mine = None
    if chosen is not None:
        levels, indices = (lhcp.shard(x, ranks, dim=2) for x in chosen)
        mine = levels, indices
    handed_on = handed_on if ranks.world_size > 1 else 0.0
    return Own(problem, inputs, dealt[0], dealt[1] if exact else None, handed_on, mine)


def deal(whole: Tensor | None, like: Tensor, dtype: torch.dtype, ranks: Ranks) -> Tensor:
    """Give every rank its chunks of rank 0's `whole` [1, N, heads, D]: [1, N / W, heads, D]."""
    if ranks.world_size == 1:
        assert whole is not None
        return whole
    layout = make_layout("zigzag", ranks.world_size)
    own = torch.empty(like.shape, dtype=dtype, device=like.device)
    for slot, piece in enumerate(own.chunk(layout.chunks_per_rank, 1)):
        parts = None
        if whole is not None:
            # Contiguous: gloo sends the memory of a strided tensor, not its elements.
            chunks = whole.contiguous().chunk(layout.num_chunks, 1)
            parts = [chunks[layout.chunks(rank)[slot]] for rank in range(ranks.world_size)]
        dist.scatter(piece, parts, group=ranks.flat, group_src=0)
    return own


def distances(ours: Answers, theirs: Answers, ranks: Ranks) -> dict[str, float]:
    """Return |ours - theirs| / |theirs| by tensor, l2 norms over all ranks; a collective."""
    sums = torch.zeros(2, len(ours), dtype=torch.float64, device=ours[0].device)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        # In pieces: a float64 copy of a long tensor is four times its size.
        for a_part, b_part in zip(a.split(2**15, 1), b.split(2**15, 1), strict=True):
            b_wide = b_part.double()
            sums[0, i] += (a_part.double() - b_wide).square().sum()
            sums[1, i] += b_wide.square().sum()
    if ranks.world_size > 1:
        dist.all_reduce(sums, group=ranks.flat)
    found: list[float] = (sums[0] / sums[1]).sqrt().tolist()
    return dict(zip(TENSORS, found, strict=True))


def attempt(run: Callable[[], T]) -> tuple[T | None, str | None]:
    """Call, and turn what goes wrong into text, said at once: other ranks may wait for this one."""
    try:
        return run(), None
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:
        text = f"{type(error).__name__}: {error}"
        print(text, file=sys.stderr, flush=True)
        return None, text
