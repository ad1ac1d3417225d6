"""The layer on one GPU against the limit, measured in the same run.

    python bench/latency.py --commit COMMIT --out bench/results/latency_h200_DATE.md
    python bench/latency.py --seqlens 32768 131072 --only table
    python bench/latency.py --backend fa4 --only table

The limit is attention over the sub-sequence by the stock kernel of `--backend`, plus what must move
at the rate of a copy. Everything about one size is timed in turn: CUDA events, medians, half the
distance of the quartiles behind ±. A size whose output is wrong prints no number, and the bench
then ends with status 1. The last line is JSON. On an H200 about three minutes, of
which the table takes one up to 256K and half of one more for 512K.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import latency_more as more
from latency_check import check
from latency_page import STAGES, TABLE, Page, card, stage_row, table_row
from latency_size import Measured, Size
from latency_size import measure as measure_size
from latency_stages import Shape, Timed, Wrong, build
from latency_stages import measure as measure_stages
from latency_timing import copy_bandwidth, matmul_rate

SECTIONS = ("table", "gqa", "share", "dilated", "deterministic", "crossover")


def measure(size: Size, copy: float, graphs: bool) -> tuple[Measured, dict[str, Timed]]:
    """Check one size, then time it and its stages.

    Raises:
        Wrong: an output is wrong.
    """
    check(size)
    stages = measure_stages(build(size.geom, Shape()), copy)
    torch.cuda.empty_cache()
    return measure_size(size, copy, dense=True, graphs=graphs), stages


def table(page: Page, seqlens: list[int], copy: float, backend: str, graphs: bool) -> None:
    """The issue's table, then each size's stages."""
    note = (
        f"B=1, H=8, d=128, bf16, L=3, p=4, k=N/64, C=16; ms; {backend} in the limit, in dense and "
        "in the layer. Peak: forward + backward beyond inputs, output and gradients."
    )
    page.section("The layer over the limit", TABLE, note)
    stages = {}
    for seqlen in seqlens:
        size = Size(seqlen, backend=backend)
        try:
            found, timed = measure(size, copy, graphs)
        except Wrong as error:
            page.refuse(size.label, error)
            continue
        stages[seqlen] = (found, timed)
        table_row(page, found)
        page.record("table", {"measured": found, "stages": timed})
        torch.cuda.empty_cache()
    header = ["N", *STAGES, "attention f", "attention b"]
    note = (
        "Kernels alone, L2 cleared: ms, the rate over a copy's, the share of the layer's forward "
        "or backward. Same bits in five runs, each stage."
    )
    page.section("Stages", header, note)
    for found, timed in stages.values():
        stage_row(page, found, timed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = [2**15, 2**16, 2**17, 2**18, 2**19]
    parser.add_argument("--seqlens", type=int, nargs="+", default=sizes)
    parser.add_argument("--only", type=lambda text: text.split(","), default=SECTIONS)
    backends = ("cudnn", "fa4", "flash", "flash_attn")
    parser.add_argument("--backend", choices=backends, default="cudnn")
    parser.add_argument("--no-graphs", action="store_true", help="leave CUDA graphs out")
    parser.add_argument("--commit", default="", help="where there is no checkout to ask")
    parser.add_argument("--out", type=Path, help="Markdown file for the card and the tables")
    args = parser.parse_args()
    if unknown := set(args.only) - set(SECTIONS):
        parser.error(f"--only {','.join(unknown)}: must be among {','.join(SECTIONS)}")

    torch.manual_seed(0)
    copy, graphs = copy_bandwidth(), not args.no_graphs
    page = Page(card(copy, matmul_rate(), args.commit))
    if "table" in args.only:
        table(page, args.seqlens, copy, args.backend, graphs)
    if "gqa" in args.only:
        lengths = [n for n in args.seqlens if 2**16 <= n <= 2**18]
        more.gqa(page, copy, args.backend, graphs, lengths)
    if "share" in args.only:
        more.share(page, copy)
    if "dilated" in args.only:
        more.dilated(page, [98304, 2**18, 2**20])
    if "deterministic" in args.only:
        more.determinism(page, [n for n in args.seqlens if 2**15 <= n <= 2**17])
    if "crossover" in args.only:
        more.crossover(page, args.backend, [2**11, 2**12, 2**13, 2**14, 24576, 2**15])
    page.close(args.out)
    sys.exit(1 if page.wrong else 0)


if __name__ == "__main__":
    main()
