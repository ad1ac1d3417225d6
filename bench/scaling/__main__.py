"""Predict what context parallelism costs up to 4M tokens; with ranks, measure it after.

    python -m bench.scaling --out bench/results/scaling_model        # .md, .json and .png
    python -m bench.scaling --calibrations mine.json --eager
    torchrun --nproc-per-node 2 -m bench.scaling --measure --seqlens 4096 --heads 4

The curves: one layer's forward + backward with the paper's sizes at 1M tokens (L=4, p=4, k=4096),
on 8 to 64 ranks in nodes of 8, dense beside lighthouse, launched in CUDA graphs; the rotation that
the model takes, what it adds to one device's time over W, what binds it, the memory of a rank. The
physical limit, bytes over NICs and NVLink, comes first. How to split GPUs: bench.scaling.plan. The
last line is JSON.
"""

from argparse import Namespace
from dataclasses import replace

from bench.common.arguments import add_device, add_heads, make_parser
from bench.common.page import Page, command, today
from bench.common.ranks import run_on_ranks
from bench.scaling.curves import SEQLENS, curves, draw, show
from bench.scaling.layer import CONFIG, MODES, NODE, Question
from bench.scaling.limits import show_limits
from bench.scaling.measured import measure
from lhcp.console import escape_unprintable
from lhcp.cost.calibration import Calibration
from lhcp.cost.tables import CALIBRATIONS, read_or_built_in
from lhcp.machine import commit


def main() -> None:
    parser = make_parser(__doc__)
    names = ", ".join(CALIBRATIONS)
    parser.add_argument(
        "--calibrations", nargs="*", default=["H200", "B200"], help=f"files, or some of {names}"
    )
    parser.add_argument("--inner-gb-s", type=float, help="another rate inside nodes")
    parser.add_argument("--outer-gb-s", type=float, help="another rate between nodes")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--out", help="write <out>.md, <out>.json and <out>.png")
    parser.add_argument("--measure", action="store_true", help="predict and measure these ranks")
    parser.add_argument("--rotations", nargs="*", default=["p2p", "allgather"])
    parser.add_argument("--seqlens", type=int, nargs="*", help="by default 256K to 4M, or 4096")
    add_heads(parser)
    parser.add_argument("--nodes", type=int, default=1)
    add_device(parser)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--single-seconds", type=float, default=0.0)
    parser.add_argument("--calibrated", help="a table of these ranks: measure its links alone")
    parser.add_argument("--large-message", type=int, help="bytes that the link is measured with")
    args = parser.parse_args()
    if args.measure:
        args.seqlens = args.seqlens or [4096]
        run_on_ranks(measure, args)
    predict(args)


def predict(args: Namespace) -> None:
    """Show limits and curves of each machine."""
    sizes = f"L={CONFIG.num_levels}, p={CONFIG.pool_factor}, k={CONFIG.topk}"
    facts = {
        "date": today(),
        "command": command(),
        "commit": commit(),
        "predicted": f"not measured; one layer, B=1, 8 heads of 128, bf16, {sizes}",
        "nodes": f"{NODE} GPUs",
        "launches": "call by call" if args.eager else "CUDA graphs",
    }
    page = Page("What context parallelism costs, predicted", facts)
    records, by_machine = [], {}
    for name in args.calibrations:
        calibration = machine(name, args)
        asked = [Question(mode, 2**20, cp, calibration) for mode in MODES for cp in (8, 32)]
        limits = show_limits(page, calibration, asked)
        rows = curves(calibration, args.seqlens or SEQLENS)
        show(page, rows, calibration)
        by_machine[calibration.name] = rows
        records.append({"calibration": calibration, "limits": limits, "rows": rows})
    if args.out:
        draw(by_machine, args.out + ".png")
    page.close(args.out, records)


def machine(name: str, args: Namespace) -> Calibration:
    """Return the table called so, with the rates that were asked for."""
    calibration = read_or_built_in(name)
    for side in ("inner", "outer"):
        rate = getattr(args, f"{side}_gb_s")
        if rate is not None:
            link = replace(getattr(calibration, side), bandwidth=1e9 * rate)
            calibration = replace(calibration, **{side: link})
    return calibration if args.eager else calibration.in_graphs()


if __name__ == "__main__":
    escape_unprintable()
    main()
