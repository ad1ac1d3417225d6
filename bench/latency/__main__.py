"""The layer on one GPU against the limit, measured in the same run.

    python -m bench.latency --commit COMMIT --out bench/results/latency_h200_DATE.md
    python -m bench.latency --seqlens 32768 131072 --only table
    python -m bench.latency --backend fa4 --only table

The limit is attention over the sub-sequence by the stock kernel of `--backend`, plus what must move
at the rate of a copy. Everything about one size is timed in turn: CUDA events, medians, half the
distance of the quartiles behind ±. A size whose output is wrong prints no number, and the bench
then ends with status 1. The last line is JSON. On an H200 about three minutes, of
which the table takes one up to 256K and half of one more for 512K.
"""

from pathlib import Path

import torch

from bench.common.arguments import make_parser
from bench.common.card import dated_card
from bench.common.page import Page
from bench.latency import extremes, sections
from bench.latency.sections import Bench
from lhcp.console import escape_unprintable
from lhcp.measure.clock import matmul_rate

SECTIONS = ("table", "gqa", "share", "dilated", "deterministic", "crossover")


def main() -> None:
    parser = make_parser(__doc__)
    sizes = [2**15, 2**16, 2**17, 2**18, 2**19]
    parser.add_argument("--seqlens", type=int, nargs="+", default=sizes)
    parser.add_argument("--only", type=lambda text: text.split(","), default=SECTIONS)
    backends = ("cudnn", "fa4", "flash", "flash_attn")
    parser.add_argument("--backend", choices=backends, default="cudnn")
    parser.add_argument("--no-graphs", action="store_true", help="leave CUDA graphs out")
    parser.add_argument("--commit", default="", help="where there is no checkout to ask")
    parser.add_argument("--out", type=Path, help="Markdown file; its JSON goes beside it")
    args = parser.parse_args()
    if unknown := set(args.only) - set(SECTIONS):
        parser.error(f"--only {','.join(unknown)}: must be among {','.join(SECTIONS)}")

    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    facts = dated_card(device, matmul_tflop_s=round(matmul_rate(device) / 1e12))
    facts["commit"] = args.commit or facts["commit"]
    page = Page("One layer on one GPU", facts)
    bench = Bench(page, facts["copy_gb_s"] * 1e9, args.backend, not args.no_graphs)
    if "table" in args.only:
        sections.table(bench, args.seqlens)
    if "gqa" in args.only:
        sections.gqa(bench, [n for n in args.seqlens if 2**16 <= n <= 2**18])
    if "share" in args.only:
        sections.share(bench)
    if "dilated" in args.only:
        extremes.dilated(bench, [98304, 2**18, 2**20])
    if "deterministic" in args.only:
        extremes.determinism(bench, [n for n in args.seqlens if 2**15 <= n <= 2**17])
    if "crossover" in args.only:
        extremes.crossover(bench, [2**11, 2**12, 2**13, 2**14, 24576, 2**15])
    page.close(args.out, bench.records)


if __name__ == "__main__":
    escape_unprintable()
    main()
