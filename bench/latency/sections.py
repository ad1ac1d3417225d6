"""The latency bench beyond its table: GQA, one rank's share, the dilated scorer, determinism, the
length below which dense attention is faster.
"""

from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import torch
from latency_check import check
from latency_page import TABLE, Page, table_row
from latency_size import Size, layer_runs
from latency_size import measure as measure_size
from latency_stages import Shape, Wrong, build
from latency_stages import measure as measure_stages
from latency_timing import Arm, captured, interleaved

import lhcp
from lhcp.lighthouse.geometry import Geometry
from lhcp.lighthouse.kernels import gather, pool, scatter, select
from lhcp.lighthouse.kernels.last_rows import last_rows
from lhcp.lighthouse.score import dilated_scores
from lhcp.reference import causal_attention

SHARE = Geometry(131072, 2, 2, 4, 4, 256, True)
"""One CP=8 rank of 1M tokens: L=4, k=4096 over the ranks, 512 on each; two chunks of zigzag."""


def share(page: Page, copy: float) -> None:
    """Everything but attention on one rank of 1M tokens at CP=8, forward."""
    note = "N/W = 131,072, L=4, p=4, k=512 on the rank; H=8, d=128. At most 0.45 ms forward."
    page.section("The share of a 1M-token CP=8 rank", ["what", "ms", "% of copy"], note)
    shape = Shape()
    try:
        found = measure_stages(build(SHARE, shape), copy)
    except Wrong as error:
        page.refuse("share", error)
        return
    for name, stage in found.items():
        page.row(name, stage.ms, f"{stage.of_copy:.0%}")
    q, k, v = shape.qkv(SHARE.num_tokens)
    o = shape.rows(SHARE.subsequence, shape.num_heads)
    halo = shape.rows(SHARE.num_chunks * (SHARE.num_levels - 1), shape.num_heads)
    halo = halo.unflatten(1, (SHARE.num_chunks, SHARE.num_levels - 1))

    def local() -> tuple[object, ...]:
        *means, sq, sk = pool.pool_and_score(q, k, v, SHARE)
        entries, places = select.select(sq, sk, SHARE)
        sub = gather.gather(q, k, v, *means, entries, SHARE)
        rows = last_rows(o, places, SHARE)
        out = scatter.scatter(o, places, SHARE)
        scatter.scatter_edges(out, o, places, halo, SHARE)
        return sub, rows, out

    whole = interleaved({"eager": Arm(local), "graph": Arm(captured(local))})
    for name, ms in whole.items():
        page.row(f"**everything but attention, {name}**", ms, "")
    page.record("share", {"stages": found, "whole": whole})


def dilated(page: Page, seqlens: list[int]) -> None:
    """Cost of the dilated scorer, both attentions and their norms."""
    note = "scorer_window 8192 (or a stratum), dilation 4; H=8, d=128, C=16. Linear in N."
    page.section("The dilated scorer", ["N", "eager ms", "graph ms", "ns a token"], note)
    for seqlen in seqlens:
        size = Size(seqlen)
        config = replace(size.config, scorer="dilated")
        geom = Geometry.local(config, seqlen, 1, 1, 0)
        with torch.no_grad():
            q, k, v, _ = size.draw(seqlen)

            def run(q=q, k=k, v=v, geom=geom, config=config) -> tuple[torch.Tensor, ...]:
                return dilated_scores(q, k, v, geom, config, 128**-0.5)

            window = min(config.scorer_window, geom.stratum_size)
            rows = [x[:, : window : config.dilation].double() for x in (q, k, v)]
            exact = causal_attention(*rows, 128**-0.5).square().sum(-1).transpose(1, 2)
            got = run()[0][..., : window : config.dilation].double()
            far = ((got - exact).norm() / exact.norm()).item()
            if not far < 1e-2:
                page.refuse(str(seqlen), f"sq is {far:.1e} from float64")
                continue
            ms = interleaved({"eager": Arm(run), "graph": Arm(captured(run))})
        cost = f"{ms['graph'].median * 1e6 / seqlen:.1f}"
        page.row(seqlen, ms["eager"], ms["graph"], cost)
        page.record("dilated", {"seqlen": seqlen, **ms})


@contextmanager
def deterministic(fill: bool):
    """torch.use_deterministic_algorithms; `fill` is its filling of new memory."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


def determinism(page: Page, seqlens: list[int]) -> None:
    """Price of torch.use_deterministic_algorithms(True): cuDNN refuses, torch's flash runs."""
    note = (
        "f+b, eager, ms. Deterministic: the same bits in two runs. By default torch also fills all "
        "new memory then; torch.utils.deterministic.fill_uninitialized_memory = False spares that."
    )
    header = ["N", "cudnn", "flash", "flash deterministic", "and filled", "price over cudnn"]
    page.section("Deterministic algorithms", header, note)
    for seqlen in seqlens:
        q, k, v, dout = Size(seqlen).draw(seqlen)
        q, k, v = (x.requires_grad_() for x in (q, k, v))

        def run(backend: str, q=q, k=k, v=v, dout=dout, seqlen=seqlen):
            return Size(seqlen, backend=backend).layer_both(q, k, v, dout)

        def exact(fill: bool, run=run):
            with deterministic(fill):
                return run("flash")

        try:
            for name, a, b in zip(("o", "dq", "dk", "dv"), exact(False), exact(False), strict=True):
                if not torch.equal(a, b):
                    raise Wrong(f"{name} differs from run to run")
            with deterministic(False):
                try:
                    run("cudnn")
                except ValueError:
                    pass
                else:
                    raise Wrong("cudnn ran under torch.use_deterministic_algorithms(True)")
        except Wrong as error:
            page.refuse(str(seqlen), error)
            continue
        ms = interleaved(
            {
                "cudnn": Arm(lambda: run("cudnn"), 9),
                "flash": Arm(lambda: run("flash"), 9),
                "deterministic": Arm(lambda: exact(False), 9),
                "filled": Arm(lambda: exact(True), 9),
            }
        )
        price = f"{ms['deterministic'].median / ms['cudnn'].median:.2f}x"
        page.row(f"{seqlen // 1024}K", *ms.values(), price)
        page.record("deterministic", {"seqlen": seqlen, **ms})


def crossover(page: Page, backend: str, seqlens: list[int]) -> None:
    """The length below which dense attention is faster, f+b."""
    header = ["N", "dense eager", "dense graph", "layer eager", "layer graph"]
    page.section("Where dense is faster", header, "f+b, ms, k = N / 64, the same backend in both.")
    points: dict[str, list[tuple[int, float]]] = {"eager": [], "graph": []}
    for seqlen in seqlens:
        size = Size(seqlen, backend=backend)
        try:
            check(size)
        except Wrong as error:
            page.refuse(str(seqlen), error)
            continue
        inputs = size.draw(seqlen)
        q, k, v = (x.requires_grad_() for x in inputs[:3])

        def dense(q=q, k=k, v=v, dout=inputs[3], backend=backend):
            out = lhcp.ring_attention(q, k, v, backend=backend)
            return torch.autograd.grad(out, (q, k, v), dout)

        runs = layer_runs(size, inputs, graphs=True)
        ms = interleaved(
            {
                "dense eager": Arm(dense),
                "dense graph": Arm(captured(dense)),
                "layer eager": Arm(runs["layer f+b"]),
                "layer graph": Arm(runs["layer f+b graph"]),
            }
        )
        for way, found in points.items():
            found.append((seqlen, ms[f"dense {way}"].median / ms[f"layer {way}"].median))
        page.row(seqlen, *ms.values())
        page.record("crossover", {"seqlen": seqlen, **ms})
    page.line("")
    for way, found in points.items():
        page.line(f"{way}: dense is faster below {crossing(found)} tokens.")


def crossing(points: list[tuple[int, float]]) -> str:
    """Where dense / layer passes 1, on a straight line between the two sizes around it."""
    for (low, below), (high, above) in pairwise(points):
        if below < 1 <= above:
            return f"about {round(low + (1 - below) / (above - below) * (high - low), -2)}"
    if points and points[0][1] >= 1:
        return f"less than {points[0][0]}"
    return f"more than {points[-1][0]}" if points else "?"


def gqa(page: Page, copy: float, backend: str, graphs: bool, seqlens: list[int]) -> None:
    """The table's rows for 32 query heads of 8 kv heads, and for head_dim 64."""
    page.section("GQA 32/8, head_dim 64", TABLE, "As the table; dense is not measured here.")
    for size in (s for n in seqlens for s in (Size(n, 32, 8), Size(n, 8, 8, 64))):
        size = replace(size, backend=backend)
        try:
            check(size)
            found = measure_size(size, copy, dense=False, graphs=graphs)
        except Wrong as error:
            page.refuse(size.label, error)
            continue
        table_row(page, found)
        page.record("gqa", found)
        torch.cuda.empty_cache()
