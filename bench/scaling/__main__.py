"""Predict what context parallelism costs; with ranks, measure it after; draw curves to 1M tokens.

    python -m bench.scaling --out bench/results/scaling_model        # curves for 32 B200s
    python -m bench.scaling --calibration mine.json
    torchrun --nproc-per-node 2 -m bench.scaling --measure --seqlens 4096 --heads 4

The curves: one layer's forward + backward at the paper's 1M-token setting (L=4, p=4, k=4096), with
context parallelism of 8 inside nodes (and dp 4) and of 32 across them, dense beside lighthouse;
what the rotation adds to one device's time over W; the memory of a rank. The last line is JSON.
"""

import json
from dataclasses import replace

from bench.common.arguments import add_device, add_heads, make_parser
from bench.common.page import last_line
from bench.common.ranks import run_on_ranks
from bench.scaling.curves import curves, draw, print_curves
from bench.scaling.measured import measure
from lhcp.console import escape_unprintable
from lhcp.cost.calibration import Calibration
from lhcp.cost.tables import CALIBRATIONS


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--calibration", default="B200", help=f"a file, or one of {', '.join(CALIBRATIONS)}"
    )
    parser.add_argument("--inner-gb-s", type=float, help="another rate inside nodes")
    parser.add_argument("--outer-gb-s", type=float, help="another rate between nodes")
    parser.add_argument("--out", help="write <out>.json and <out>.png")
    parser.add_argument("--measure", action="store_true", help="predict and measure these ranks")
    parser.add_argument("--rotations", nargs="*", default=["p2p", "allgather"])
    parser.add_argument("--seqlens", type=int, nargs="*", default=[4096])
    add_heads(parser)
    parser.add_argument("--nodes", type=int, default=1)
    add_device(parser)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--single-seconds", type=float, default=0.0)
    parser.add_argument("--large-message", type=int, help="bytes that the link is measured with")
    args = parser.parse_args()
    if args.measure:
        run_on_ranks(measure, args)
    known = CALIBRATIONS.get(args.calibration)
    calibration = known or Calibration.load(args.calibration)
    for side in ("inner", "outer"):
        rate = getattr(args, f"{side}_gb_s")
        if rate is not None:
            link = replace(getattr(calibration, side), bandwidth=1e9 * rate)
            calibration = replace(calibration, **{side: link})
    rows = curves(calibration)
    print_curves(rows, calibration)
    if args.out:
        draw(rows, calibration, args.out + ".png")
    document = {"calibration": json.loads(calibration.text), "rows": rows}
    last_line(document, None if args.out is None else args.out + ".json")


if __name__ == "__main__":
    escape_unprintable()
    main()
