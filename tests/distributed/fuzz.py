"""Random questions to the library, each drawn from a number alone, and their right answers.

    python -m tests.distributed.fuzz 4711               # one case again, in words
    python -m tests.distributed.fuzz 0 --count 5000     # many, on four gloo ranks
    python -m tests.distributed.fuzz 0 --count 5000 --device cuda --seconds 60 --ranks 2   # on GPUs

A case is everything that a caller may choose: sizes, config, heads, dtype, strides, ranks, layout,
rotation, backend, function or layer, recomputed or not, lighthouse or dense, packed documents.
"""

import argparse
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import lhcp
from lhcp.comm.mesh import as_ranks
from lhcp.reference_documents import documents
from lhcp.testing.inputs import qkv
from lhcp.testing.ranks import RankPool
from lhcp.testing.tolerance import assert_close_float64
from tests.cases import (
    LAYOUTS,
    ROTATIONS,
    Answer,
    Case,
    Problem,
    decode,
    dense_reference,
    heads_first,
    library_selection,
    num_nodes,
    reference_answer,
    reference_selection,
    serves,
    strided,
    together,
)
from tests.documents import KINDS

MOST = 40_000
"""Elements of q in a case: thousands of cases are worth more than large ones."""
STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "packed": torch.clone,
    "strided": strided,
    "heads first": heads_first,
}
DTYPES = (torch.float64,) * 5 + (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Fuzzed:
    """One case."""

    seed: int
    case: Case
    dense: bool = False
    causal: bool = True
    length: int = 0
    """Tokens of a chunk, of a dense case."""
    strides: tuple[str, str, str, str] = ("packed",) * 4
    """Of q, k, v and the output's gradient."""
    layer: bool = False
    """By `LighthouseAttention`, else by the function."""
    recompute: bool = False
    """In activation checkpointing."""

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Whole q, k, v and do, packed."""
        p = self.case.problem
        if not self.dense:
            return p.inputs()
        return qkv(
            2 * self.case.world_size * self.length,
            batch=p.batch,
            num_heads=p.num_kv_heads * p.groups,
            num_kv_heads=p.num_kv_heads,
            head_dim=p.head_dim,
            dtype=p.dtype,
            seed=p.seed,
        )

    @property
    def cu_seqlens(self) -> Tensor | None:
        """Where documents begin, None without; rows of a dense case draw their own."""
        p = self.case.problem
        if p.packed is None or not self.dense:
            return p.cu_seqlens
        rng, n = random.Random(f"{p.packed} {self.seed}"), 2 * self.case.world_size * self.length
        found: list[int] = []
        for row in range(p.batch):
            others = rng.sample(range(1, n), rng.randint(0, min(n - 1, 12)))
            found += [row * n + t for t in (0, *sorted(others))]
        return torch.tensor([*found, p.batch * n], dtype=torch.int32)

    @property
    def docs(self) -> Tensor | None:
        """The oracle's document of each token, [B, N]."""
        if (bounds := self.cu_seqlens) is None:
            return None
        batch = self.case.problem.batch
        return documents(bounds, batch, int(bounds[-1]) // batch)

    def __str__(self) -> str:
        p = self.case.problem
        what = f"dense {'causal' if self.causal else 'full'}, chunks of {self.length}"
        mode = what if self.dense else "lighthouse"
        how = "layer" if self.layer else "function"
        again = ", recomputed" if self.recompute else ""
        again += f", documents {self.cu_seqlens.tolist()}" if self.cu_seqlens is not None else ""
        return (
            f"{mode}, {self.case}, Hk{p.num_kv_heads}, {p.dtype}, {self.case.backend}, "
            f"{'/'.join(self.strides)}, {how}{again}; again: python -m tests.distributed.fuzz "
            f"{self.seed}"
        )


def draw(seed: int) -> Fuzzed:
    """Return the case of a number: the first of its draws that can be done, and in no time."""
    rng = random.Random(seed)
    while True:
        fuzzed = _draw(rng, seed)
        p, world = fuzzed.case.problem, fuzzed.case.world_size
        length = 2 * world * fuzzed.length if fuzzed.dense else p.seqlen
        size = length * p.batch * p.num_kv_heads * p.groups * p.head_dim
        if size <= MOST and length <= 2048 and serves(fuzzed.case.rotation, world, p.num_kv_heads):
            return fuzzed


def _draw(rng: random.Random, seed: int) -> Fuzzed:
    pick = rng.choice
    world, layout = pick((1, 2, 3, 4)), pick(LAYOUTS)
    dense, layer = rng.random() < 0.3, rng.random() < 0.3
    chunks = world * (2 if layout == "zigzag" else 1)
    fixed = rng.random() < 0.2
    dtype = pick(DTYPES)
    # What the other scorer attends to is rounded in low precision, so that it may take others.
    scorer = pick(("norm", "dilated")) if dtype == torch.float64 else "norm"
    problem = Problem(
        num_levels=pick((2, 3, 4)),
        pool_factor=pick((2, 3, 4, 5, 8)),
        num_strata=chunks * pick((1, 2, 3)),
        picks=pick((2, 4, 6)),
        batch=pick((1, 1, 2, 3)),
        num_kv_heads=pick((1, 2, 3, 4)),
        groups=pick((1, 2, 3, 4)),
        head_dim=pick((1, 2, 4, 5, 8, 16)),
        scorer=scorer,
        scale=pick((None, None, 0.3, 1.7)),
        scored=not fixed and rng.random() < 0.3,
        fixed=fixed,
        dtype=dtype,
        seed=seed,
    )
    case = Case(
        problem=problem,
        world_size=world,
        layout=layout,
        rotation=pick(ROTATIONS),
        backend=pick(("auto", "auto", "cpu", "math")),
    )
    fuzzed = Fuzzed(
        seed=seed,
        case=case,
        dense=dense,
        # A layer is causal.
        causal=layer or rng.random() < 0.8,
        length=rng.randint(1, 40),
        strides=(pick([*STRIDES]), pick([*STRIDES]), pick([*STRIDES]), pick([*STRIDES])),
        layer=layer,
        recompute=rng.random() < 0.2,
    )
    # The last draw: the numbers of before documents are the cases that they were, or packed.
    packed = pick(KINDS) if rng.random() < 0.35 else None
    return replace(fuzzed, case=replace(case, problem=replace(problem, packed=packed)))


def answers(group: Any, seeds: Sequence[int], device: str) -> list[tuple[Tensor, ...]]:
    """Return this rank's parts of the library's answers to cases of its group's size."""
    return [answer(group, draw(seed), device) for seed in seeds]


def answer(group: Any, fuzzed: Fuzzed, device: str) -> tuple[Tensor, ...]:
    """Return o, dq, dk, dv; and of lighthouse the selection's levels and indices, on the CPU."""
    case, p = fuzzed.case, fuzzed.case.problem

    def cut(x: Tensor) -> Tensor:
        return lhcp.shard(x.to(device), group, layout=case.layout)

    parts = [STRIDES[name](cut(x)) for name, x in zip(fuzzed.strides, fuzzed.inputs(), strict=True)]
    do = parts.pop()
    leaves = [x.requires_grad_() for x in parts]
    backend = "auto" if device == "cuda" and case.backend == "cpu" else case.backend
    how = {"layout": case.layout, "rotation": case.rotation, "backend": backend}
    how |= {"scale": p.scale}
    bounds = fuzzed.cu_seqlens
    given: dict[str, Any] = {"cu_seqlens": None if bounds is None else bounds.to(device)}
    selection = None
    if not fuzzed.dense:
        selection = library_selection(group, case, device)
        if p.fixed:
            given["selection"] = selection
        if p.scored:
            given["score_q"], given["score_k"] = map(cut, p.other_inputs()[:2])
    if fuzzed.layer:
        attend: Callable[..., Any] = lhcp.LighthouseAttention(
            None if fuzzed.dense else p.config, group, **how
        )
    elif fuzzed.dense:
        attend = lhcp.ring_attention
        given |= {"group": group, "causal": fuzzed.causal, **how}
    else:
        attend, given = lhcp.lighthouse_attention, given | {"group": group, **how}
        given["config"] = p.config
    if fuzzed.recompute:
        o = checkpoint(lambda *x: attend(*x, **given), *leaves, use_reentrant=False)
    else:
        o = attend(*leaves, **given)
    results = tuple(x.cpu() for x in (o.detach(), *torch.autograd.grad(o, leaves, do)))
    if selection is None:
        return results
    ranks = as_ranks(group)
    place = (case.layout, ranks.world_size, ranks.rank)
    return *results, *decode(selection, p.config, p.seqlen, *place)


def dense_answer(fuzzed: Fuzzed, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the right o, dq, dk, dv of a dense case, computed in a dtype."""
    q, k, v, do = (x.to(dtype) for x in fuzzed.inputs())
    leaves = [x.requires_grad_() for x in (q, k, v)]
    scale = fuzzed.case.problem.scale
    o, _ = dense_reference(*leaves, causal=fuzzed.causal, scale=scale, docs=fuzzed.docs)
    dq, dk, dv = torch.autograd.grad(o, leaves, do)
    return o.detach(), dq, dk, dv


def right(fuzzed: Fuzzed, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return the reference's answer, computed in a dtype."""
    if fuzzed.dense:
        return dense_answer(fuzzed, dtype)
    return reference_answer(fuzzed.case.problem, dtype)


def lse_rounding(fuzzed: Fuzzed) -> float:
    """Return the error of a float32 lse, which is handed on to later steps and to the backward.

    Of a packed selection as if it were not packed.
    """
    p = fuzzed.case.problem
    q, k, v, _ = (x.double() for x in fuzzed.inputs())
    if not fuzzed.dense:
        selection = reference_selection(p)
        q, k, v = (lhcp.reference.gather(x, selection, p.config) for x in (q, k, v))
    docs = fuzzed.docs if fuzzed.dense else None
    _, lse = dense_reference(q, k, v, causal=fuzzed.causal, scale=p.scale, docs=docs)
    return torch.finfo(torch.float32).eps * lse.abs().max().item()


def within_budget(name: str, ours: Tensor, same: Tensor, exact: Tensor, lse: float) -> None:
    """Check as `assert_within_budget`, by root mean squares: a largest error of few is chance."""
    assert bool(ours.isfinite().all()), f"{name}: not finite"
    error, theirs = ((x.double() - exact).norm().item() for x in (ours, same))
    band = (torch.finfo(ours.dtype).eps + lse) * exact.norm().item()
    assert error <= 2 * (theirs + band), f"{name}: error {error:.3e}, torch has {theirs:.3e}"


def check(fuzzed: Fuzzed, parts: Sequence[tuple[Tensor, ...]]) -> None:
    """Compare all ranks' parts with the reference.

    Raises:
        AssertionError: they differ; the message has the case, and how to see it again.
    """
    case, dtype = fuzzed.case, fuzzed.case.problem.dtype
    got = [
        together([part[i] for part in parts], case.layout, dim=2 if i >= 4 else 1)
        for i in range(len(parts[0]))
    ]
    exact = right(fuzzed, torch.float64)
    try:
        for i in range(4, len(got)):
            assert torch.equal(got[i], exact[i]), f"another selection: {Answer._fields[i]}"
        if dtype == torch.float64:
            for name, ours, theirs in zip(Answer._fields, got[:4], exact[:4], strict=False):
                assert_close_float64(name, ours, theirs)
            return
        same = right(fuzzed, dtype)
        lse = lse_rounding(fuzzed)
        for name, *results in zip(Answer._fields, got[:4], same[:4], exact[:4], strict=False):
            assert results[0].dtype == dtype
            within_budget(name, *results, lse)
    except AssertionError as error:
        raise AssertionError(f"{fuzzed}: {error}") from error


def checked(pool: RankPool, seeds: Sequence[int], device: str = "cpu") -> Iterator[tuple[int, str]]:
    """Ask all cases, those of as many ranks at once; yield each number and what is wrong, or ""."""
    groups: dict[tuple[int, int | None], list[int]] = {}
    for seed in seeds:
        case = draw(seed).case
        groups.setdefault((case.world_size, num_nodes(case)), []).append(seed)
    for (world, nodes), own in groups.items():
        if world == 1:
            parts = [answers(None, own, device)]
        else:
            parts = pool.run(answers, world, own, device, num_nodes=nodes)
        for seed, *of_ranks in zip(own, *parts, strict=True):
            try:
                check(draw(seed), of_ranks)
            except AssertionError as error:
                yield seed, str(error)
            else:
                yield seed, ""


def main() -> None:
    """Ask cases from a number on; end with 1 if any answer is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("seed", type=int, help="number of the first case")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no more then")
    parser.add_argument("--ranks", type=int, default=4, help="leave out the cases of more")
    asked = parser.parse_args()
    if asked.count == 1:
        print(draw(asked.seed), flush=True)
    torch.set_num_threads(1)
    # A GPU compiles kernels for most cases: fewer at a time, so that it ends in time.
    chunk = 100 if asked.device == "cpu" else 16
    pool = RankPool(asked.ranks, timeout=600, poison=True, by_nccl=asked.device == "cuda")
    wrong, begin, done = 0, time.monotonic(), 0
    for first in range(asked.seed, asked.seed + asked.count, chunk):
        if time.monotonic() - begin > asked.seconds:
            break
        asked_now = range(first, min(first + chunk, asked.seed + asked.count))
        seeds = [seed for seed in asked_now if draw(seed).case.world_size <= asked.ranks]
        for _, said in checked(pool, seeds, asked.device):
            wrong += bool(said)
            if said:
                print(f"WRONG {said}", flush=True)
        done += len(seeds)
    pool.close()
    seconds = time.monotonic() - begin
    print(f"{done} cases from {asked.seed} on, {wrong} wrong, {seconds:.0f} s")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
