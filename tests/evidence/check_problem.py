"""What bench/check_ranks.py compares: one computation, on all ranks and on rank 0 alone.

Rank 0 computes the whole while the others wait on the host, and deals out what each rank's own
answer is compared with, so only rank 0 ever holds whole tensors.

Shapes: one sequence of N tokens, H query heads, Hk kv heads, D head_dim, zigzag on W ranks.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from evidence import whole_entries
from torch import Tensor

import lhcp
from lhcp import reference
from lhcp.comm.layout import Layout, make_layout
from lhcp.comm.mesh import Ranks
from lhcp.lighthouse.select import Selection

TENSORS = ("out", "dq", "dk", "dv")
Answers = tuple[Tensor, ...]
"""out, dq, dk, dv: [1, n, H or Hk, D]."""
Entries = tuple[Tensor, Tensor]
"""Levels of entries and their indices in the whole sequence, int64 [1, Hk, S / W] on the CPU."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Dense attention, or the layer where there is a config."""

    seqlen: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    config: lhcp.LighthouseConfig | None = None
    seed: int = 0

    @property
    def attended(self) -> int:
        """Tokens or entries of all ranks that attention runs on."""
        if self.config is None:
            return self.seqlen
        return self.config.subsequence_length(self.seqlen)

    @property
    def kind(self) -> str:
        return "dense" if self.config is None else "layer"

    def inputs(self, chunks: Sequence[int], num_chunks: int, device: torch.device) -> Answers:
        """q, k, v and the gradient of out for some of `num_chunks` chunks, [1, n, heads, D].

        A chunk has its own seed, so every rank draws its part of the same whole. Rows differ in
        size by an order of magnitude, so that selection has work to do.
        """
        size = self.seqlen // num_chunks
        counts = (self.num_heads, self.num_kv_heads, self.num_kv_heads, self.num_heads)
        shapes = [(1, size * len(chunks), heads, self.head_dim) for heads in counts]
        drawn = tuple(torch.empty(shape, dtype=self.dtype, device=device) for shape in shapes)
        for place, chunk in enumerate(chunks):
            generator = torch.Generator(device).manual_seed(self.seed * 1_000_003 + chunk)
            for x in drawn:
                into = x[:, place * size : (place + 1) * size]
                rows = torch.randn(into.shape, generator=generator, device=device)
                sizes = torch.rand((*into.shape[:3], 1), generator=generator, device=device)
                into.copy_(rows.mul_(sizes.mul_(1.8).add_(0.2)))
        return drawn

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **choices: Any) -> Tensor:
        """Call the library: `choices` are keyword arguments of its functions."""
        if self.config is None:
            return lhcp.ring_attention(q, k, v, **choices)
        return lhcp.lighthouse_attention(q, k, v, config=self.config, **choices)

    def answer(
        self, inputs: Answers, attend: Callable[..., Tensor] | None = None, **choices: Any
    ) -> Answers:
        """out, dq, dk, dv of these inputs.

        Args:
            inputs: q, k, v and the gradient of out.
            attend: in place of the method, for example compiled.
        """
        *leaves, dout = (x.detach() for x in inputs)
        leaves = [x.requires_grad_() for x in leaves]
        out = (attend or self.attend)(*leaves, **choices)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    def entries(self, inputs: Answers, ranks: Ranks) -> Entries | None:
        """What these ranks select, as places in the whole sequence; None for dense attention."""
        if self.config is None:
            return None
        q, k, *_ = inputs
        chosen = lhcp.select(q, k, config=self.config, group=ranks)
        # Indices into the whole are made by tables on the CPU.
        found = Selection(*(x.cpu() for x in chosen))
        return whole_entries(found, self.config, self.seqlen, ranks)

    def exact(self, inputs: Answers, entries: Entries | None) -> tuple[Answers, float]:
        """The reference's answers in float64 from the same rounded inputs and the same selection.

        Returns:
            answers; the rounding error of a float32 lse of the largest size that occurs.
        """
        double = tuple(x.double() for x in inputs)
        q, k, v, _ = double
        if entries is None or self.config is None:
            answers = self.answer(double, reference.causal_attention)
        else:
            config = self.config
            selection = reference.ReferenceSelection(*(x.to(q.device) for x in entries))

            def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return reference.lighthouse_attention(q, k, v, config=config, selection=selection)

            answers = self.answer(double, oracle)
            q, k, v = (reference.gather(x, selection, config) for x in (q, k, v))
        _, lse = lhcp.ring_attention(q, k, v, backend="math", return_lse=True)
        return answers, torch.finfo(torch.float32).eps * lse.abs().max().item()


@dataclass(frozen=True)
class Own:
    """This rank's part of a problem and of what rank 0 computed alone."""

    problem: Problem
    inputs: Answers
    alone: Answers
    """One rank's answers in the problem's dtype."""
    exact: Answers | None
    """The reference's in float64, where it was asked for."""
    handed_on: float
    """Largest error of the float32 lse that ring steps merge by; relative, of each part."""
    entries: Entries | None
    """What one rank selected."""


def layout_of(ranks: Ranks) -> Layout:
    return make_layout("zigzag", ranks.world_size)


def prepare(problem: Problem, ranks: Ranks, device: torch.device, backend: str, exact: bool) -> Own:
    """Let rank 0 compute the whole alone, and deal it out; a collective.

    Args:
        backend: of rank 0's run in the problem's dtype.
        exact: also compute in float64, from the same rounded inputs and the same selection.

    Raises:
        RuntimeError: rank 0 could not, on every rank.
    """
    layout = layout_of(ranks)
    inputs = problem.inputs(layout.chunks(ranks.rank), layout.num_chunks, device)

    def compute() -> tuple[list[Answers], float, Entries | None]:
        whole = problem.inputs(range(layout.num_chunks), layout.num_chunks, device)
        chosen = problem.entries(whole, Ranks())
        found, handed_on = [problem.answer(whole, backend=backend)], 0.0
        if exact:
            true, handed_on = problem.exact(whole, chosen)
            found.append(true)
        return found, handed_on, chosen

    found, handed_on, chosen, error = [], 0.0, None, None
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
    mine = chosen and tuple(lhcp.shard(x, ranks, dim=2) for x in chosen)
    handed_on = handed_on if ranks.world_size > 1 else 0.0
    return Own(problem, inputs, dealt[0], dealt[1] if exact else None, handed_on, mine)


def deal(whole: Tensor | None, like: Tensor, dtype: torch.dtype, ranks: Ranks) -> Tensor:
    """Give every rank its chunks of rank 0's `whole` [1, N, heads, D]: [1, N / W, heads, D]."""
    if ranks.world_size == 1:
        assert whole is not None
        return whole
    layout = layout_of(ranks)
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
    """|ours - theirs| / |theirs| by tensor, l2 norms over all ranks; a collective."""
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


def gathered(value: T, ranks: Ranks) -> list[T]:
    """Every rank's value; waits on the host, so that a shared GPU is free meanwhile."""
    everybody = [value] * ranks.world_size
    if ranks.world_size > 1:
        dist.all_gather_object(everybody, value, group=ranks.flat)
    return everybody


def attempt(run: Callable[[], T]) -> tuple[T | None, str | None]:
    """Call, and turn what goes wrong into text, said at once: other ranks may wait for this one."""
    try:
        return run(), None
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:
        text = f"{type(error).__name__}: {error}"
        print(text, file=sys.stderr, flush=True)
        return None, text
