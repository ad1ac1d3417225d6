"""Sections of the latency page at the layer's edges: dilated scorer, determinism, short lengths."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import torch
import torch.utils.deterministic
from torch import Tensor

import lhcp
from bench.common.problem import TENSORS
from bench.common.turns import Arm, Spread, captured, interleaved
from bench.latency.check import check
from bench.latency.sections import Bench
from bench.latency.size import Size, layer_runs
from bench.latency.stages import Wrong
from lhcp.lighthouse.geometry import Geometry
from lhcp.lighthouse.kernel_set import QKV
from lhcp.lighthouse.score import ScoreInputs, dilated_scores
from lhcp.reference import causal_attention


def dilated(bench: Bench, seqlens: list[int]) -> None:
    """Time the dilated scorer, both attentions and their norms."""
    note = "scorer_window 8192 (or a stratum), dilation 4; H=8, d=128, C=16. Linear in N."
    bench.page.table("The dilated scorer", note, ["N", "eager ms", "graph ms", "ns a token"])
    for seqlen, ms in bench.each(seqlens, _dilated_times):
        cost = f"{ms['graph'].median * 1e6 / seqlen:.1f}"
        bench.page.row(seqlen, ms["eager"], ms["graph"], cost)
        bench.record("dilated", {"seqlen": seqlen, **ms})


@torch.no_grad()
def _dilated_times(seqlen: int) -> dict[str, Spread]:
    size = Size(seqlen)
    config = replace(size.config, scorer="dilated")
    geom = Geometry.local(config, seqlen, 1, 1, 0)
    *qkv, _ = size.draw(seqlen)
    inputs = ScoreInputs(geom, config, "triton", 128**-0.5)

    def run() -> tuple[Tensor, ...]:
        return dilated_scores(QKV(*qkv), inputs)

    first = slice(0, min(config.scorer_window, geom.stratum_size), config.dilation)
    rows = (x[:, first].double() for x in qkv)
    exact = causal_attention(next(rows), next(rows), next(rows), 128**-0.5)
    exact = exact.square().sum(-1).transpose(1, 2)
    far = ((run()[0][..., first].double() - exact).norm() / exact.norm()).item()
    if not far < 1e-2:
        raise Wrong(f"sq is {far:.1e} from float64")
    return interleaved({"eager": Arm(run), "graph": Arm(captured(run))})


@contextmanager
def deterministic(fill: bool) -> Iterator[None]:
    """Use deterministic algorithms; `fill` is torch's filling of new memory."""
    settings = torch.utils.deterministic
    before = settings.fill_uninitialized_memory  # type: ignore[attr-defined]
    settings.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        settings.fill_uninitialized_memory = before  # type: ignore[attr-defined]


def determinism(bench: Bench, seqlens: list[int]) -> None:
    """Find the price of deterministic algorithms: cuDNN refuses them, torch's flash runs."""
    note = (
        "f+b, eager, ms. Deterministic: the same bits in two runs. By default torch also fills all "
        "new memory then; torch.utils.deterministic.fill_uninitialized_memory = False spares that."
    )
    header = ["N", "cudnn", "flash", "flash deterministic", "and filled", "price over cudnn"]
    bench.page.table("Deterministic algorithms", note, header)
    for seqlen, ms in bench.each(seqlens, _deterministic_times):
        price = f"{ms['deterministic'].median / ms['cudnn'].median:.2f}x"
        bench.page.row(f"{seqlen // 1024}K", *ms.values(), price)
        bench.record("deterministic", {"seqlen": seqlen, **ms})


def _deterministic_times(seqlen: int) -> dict[str, Spread]:
    q, k, v, dout = Size(seqlen).draw(seqlen)
    q, k, v = (x.requires_grad_() for x in (q, k, v))

    def run(backend: str) -> tuple[Tensor, ...]:
        return Size(seqlen, backend=backend).layer_both(q, k, v, dout)

    def exact(fill: bool) -> tuple[Tensor, ...]:
        with deterministic(fill):
            return run("flash")

    for name, a, b in zip(TENSORS, exact(False), exact(False), strict=True):
        if not torch.equal(a, b):
            raise Wrong(f"{name} differs from run to run")
    with deterministic(False):
        try:
            run("cudnn")
        except ValueError:
            pass
        else:
            raise Wrong("cudnn ran under torch.use_deterministic_algorithms(True)")
    return interleaved(
        {
            "cudnn": Arm(lambda: run("cudnn"), 9),
            "flash": Arm(lambda: run("flash"), 9),
            "deterministic": Arm(lambda: exact(False), 9),
            "filled": Arm(lambda: exact(True), 9),
        }
    )


def crossover(bench: Bench, seqlens: list[int]) -> None:
    """Find the length below which dense attention is faster, f+b."""
    header = ["N", "dense eager", "dense graph", "layer eager", "layer graph"]
    note = "f+b, ms, k = N / 64, the same backend in both."
    bench.page.table("Where dense is faster", note, header)
    points: dict[str, list[tuple[int, float]]] = {"eager": [], "graph": []}
    sizes = [Size(n, backend=bench.backend) for n in seqlens]
    for size, ms in bench.each(sizes, _both_times, lambda size: str(size.seqlen)):
        seqlen = size.seqlen
        for way, found in points.items():
            found.append((seqlen, ms[f"dense {way}"].median / ms[f"layer {way}"].median))
        bench.page.row(seqlen, *ms.values())
        bench.record("crossover", {"seqlen": seqlen, **ms})
    bench.page.line("")
    for way, found in points.items():
        bench.page.line(f"{way}: dense is faster below {crossing(found)} tokens.")


def _both_times(size: Size) -> dict[str, Spread]:
    check(size)
    inputs = size.draw(size.seqlen)
    q, k, v = (x.requires_grad_() for x in inputs[:3])

    def dense() -> tuple[Tensor, ...]:
        out = lhcp.ring_attention(q, k, v, backend=size.backend)
        return torch.autograd.grad(out, (q, k, v), inputs[3])

    runs = layer_runs(size, inputs, graphs=True)
    return interleaved(
        {
            "dense eager": Arm(dense),
            "dense graph": Arm(captured(dense)),
            "layer eager": Arm(runs["layer f+b"]),
            "layer graph": Arm(runs["layer f+b graph"]),
        }
    )


def crossing(points: list[tuple[int, float]]) -> str:
    """Say where dense / layer passes 1, on a straight line between the two sizes around it."""
    for (low, below), (high, above) in pairwise(points):
        if below < 1 <= above:
            return f"about {round(low + (1 - below) / (above - below) * (high - low), -2)}"
    if points and points[0][1] >= 1:
        return f"less than {points[0][0]}"
    return f"more than {points[-1][0]}" if points else "?"
