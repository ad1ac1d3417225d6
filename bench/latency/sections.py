"""Sections of the latency page that hold the layer and its stages against what they must move."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from bench.common.page import Page
from bench.common.turns import Arm, captured, interleaved
from bench.latency.check import check
from bench.latency.size import Measured, Size, measure
from bench.latency.stages import Shape, Timed, Wrong, build
from bench.latency.stages import measure as measure_stages
from bench.latency.tables import STAGES, TABLE, stage_row, table_row
from lhcp.lighthouse.geometry import Geometry
from lhcp.lighthouse.kernel_set import QKV
from lhcp.lighthouse.kernels import gather, pool, scatter, select
from lhcp.lighthouse.kernels.last_rows import last_rows

T = TypeVar("T")
M = TypeVar("M")

SHARE = Geometry(131072, 2, 2, 4, 4, 256, True)
"""One CP=8 rank of 1M tokens: L=4, k=4096 over the ranks, 512 on each; two chunks of zigzag."""


@dataclass(frozen=True)
class Bench:
    """What all sections share."""

    page: Page
    copy: float
    """Bytes a second of a copy."""
    backend: str
    graphs: bool
    """Whether the layer is replayed as CUDA graphs as well."""
    records: dict[str, list[Any]] = field(default_factory=dict)

    def each(
        self, sizes: Iterable[T], measure: Callable[[T], M], label: Callable[[T], str] = str
    ) -> Iterator[tuple[T, M]]:
        """Measure one size after the other; of a wrong one the page has no number."""
        for size in sizes:
            try:
                found = measure(size)
            except Wrong as error:
                self.page.refuse(label(size), error)
                continue
            yield size, found
            torch.cuda.empty_cache()

    def record(self, section: str, value: Any) -> None:
        """Keep a result for the JSON document."""
        self.records.setdefault(section, []).append(value)


def table(bench: Bench, seqlens: list[int]) -> None:
    """Measure the layer over its limit, then show each size's stages."""
    note = (
        f"B=1, H=8, d=128, bf16, L=3, p=4, k=N/64, C=16; ms; {bench.backend} in the limit, in "
        "dense and in the layer. Peak: forward + backward beyond inputs, output and gradients."
    )
    bench.page.table("The layer over the limit", note, TABLE)

    def measured(size: Size) -> tuple[Measured, dict[str, Timed]]:
        check(size)
        timed = measure_stages(build(size.geom, Shape()), bench.copy)
        torch.cuda.empty_cache()
        return measure(size, bench.copy, dense=True, graphs=bench.graphs), timed

    sizes, stages = [Size(n, backend=bench.backend) for n in seqlens], []
    for _, (found, timed) in bench.each(sizes, measured, lambda size: size.label):
        stages.append((found, timed))
        table_row(bench.page, found)
        bench.record("table", {"measured": found, "stages": timed})
    note = (
        "Kernels alone, L2 cleared: ms, the rate over a copy's, the share of the layer's forward "
        "or backward. Same bits in five runs, each stage."
    )
    bench.page.table("Stages", note, ["N", *STAGES, "attention f", "attention b"])
    for found, timed in stages:
        stage_row(bench.page, found, timed)


def gqa(bench: Bench, seqlens: list[int]) -> None:
    """Measure the table's rows for 32 query heads of 8 kv heads, and for head_dim 64."""
    note = "As the table; dense is not measured here."
    bench.page.table("GQA 32/8, head_dim 64", note, TABLE)

    def measured(size: Size) -> Measured:
        check(size)
        return measure(size, bench.copy, dense=False, graphs=bench.graphs)

    kinds = [(n, *kind) for n in seqlens for kind in ((32, 8, 128), (8, 8, 64))]
    sizes = [Size(*kind, backend=bench.backend) for kind in kinds]
    for _, found in bench.each(sizes, measured, lambda size: size.label):
        table_row(bench.page, found)
        bench.record("gqa", found)


def share(bench: Bench) -> None:
    """Time everything but attention on one rank of 1M tokens at CP=8, forward."""
    note = "N/W = 131,072, L=4, p=4, k=512 on the rank; H=8, d=128. At most 0.45 ms forward."
    page = bench.page
    page.table("The share of a 1M-token CP=8 rank", note, ["what", "ms", "% of copy"])
    shape = Shape()
    try:
        found = measure_stages(build(SHARE, shape), bench.copy)
    except Wrong as error:
        page.refuse("share", error)
        return
    for name, stage in found.items():
        page.row(name, stage.ms, f"{stage.of_copy:.0%}")
    tokens = QKV(*shape.qkv(SHARE.num_tokens))
    o = shape.rows(SHARE.subsequence, shape.num_heads)
    halo = shape.rows(SHARE.num_chunks * (SHARE.num_levels - 1), shape.num_heads)
    halo = halo.unflatten(1, (SHARE.num_chunks, SHARE.num_levels - 1))

    def local() -> tuple[object, ...]:
        means, sq, sk = pool.pool_and_score(tokens, SHARE)
        entries, row_of_entry = select.select(sq, sk, SHARE)
        sub = gather.gather(tokens, means, entries, SHARE)
        rows = last_rows(o, row_of_entry, SHARE)
        out = scatter.scatter(o, row_of_entry, SHARE)
        scatter.scatter_edges(out, o, row_of_entry, halo, SHARE)
        return sub, rows, out

    whole = interleaved({"eager": Arm(local), "graph": Arm(captured(local))})
    for name, ms in whole.items():
        page.row(f"**everything but attention, {name}**", ms, "")
    bench.record("share", {"stages": found, "whole": whole})
