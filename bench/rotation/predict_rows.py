"""What the cost model says of calls of bench.rotation.overhead, written down before they run.

    python -m bench.rotation.predict_rows --json out.json \
        --row l4_w8 "--world 8 --nodes 2 --rotations p2p allgather --seqlens 1048576 --topk 4096"

Each --row has a name and the arguments of one call of bench.rotation.overhead, with --world in
place of torchrun's --nproc-per-node; arguments that only say how to measure are passed over. For a
layer the model plays the attention over its S entries, as overhead's first table measures it. All
ranks are on one host, so both axes of a mesh have the inner link. The last line is JSON.
"""

import argparse
import shlex
from dataclasses import replace
from typing import Any

from bench.common.arguments import (
    add_heads,
    add_json,
    add_layer,
    add_lengths,
    config_of,
    make_parser,
)
from bench.common.page import last_line, text_table
from lhcp.comm.layout import make_layout
from lhcp.console import escape_unprintable
from lhcp.cost.calibration import Calibration
from lhcp.cost.choose import PhasePrediction, predict
from lhcp.cost.tables import CALIBRATIONS
from lhcp.ring.heads import TWO_AXES, fits
from lhcp.ring.shape import AttentionShape

Row = dict[str, Any]


def sizes_parser() -> argparse.ArgumentParser:
    """Read the arguments of a call of overhead that decide what is computed, with its defaults."""
    parser = argparse.ArgumentParser(prog="--row", add_help=False)
    parser.add_argument("--world", type=int, required=True)
    add_lengths(parser)
    add_layer(parser)
    add_heads(parser)
    parser.add_argument("--kv-heads", type=int)
    return parser


def on_one_host(calibration: Calibration) -> Calibration:
    """Return the same machine with its inner link on both axes of a mesh."""
    return replace(calibration, outer=calibration.inner)


def predicted(
    name: str, arguments: list[str], calibration: Calibration, element_bytes: int
) -> list[Row]:
    """Return a row a length and rotation of one call, of those that its ranks and heads fit.

    Args:
        calibration: of one host.
        element_bytes: of an element of q, k, v.

    Raises:
        SystemExit, ValueError: the sizes do not fit.
    """
    args, _ = sizes_parser().parse_known_args(arguments)
    config = config_of(args)
    rows = []
    for rotation in args.rotations:
        for seqlen in args.seqlens:
            entries = seqlen if config is None else config.subsequence_length(seqlen)
            shape = AttentionShape(
                seqlen=entries,
                layout=make_layout(args.layout, args.world),
                num_heads=args.heads,
                num_kv_heads=args.kv_heads or args.heads,
                head_dim=args.head_dim,
                batch=args.batch,
                element_bytes=element_bytes,
                node_size=args.world // args.nodes if rotation in TWO_AXES else None,
            )
            if not fits(rotation, shape):
                continue
            found = predict(rotation, shape, calibration)
            row: Row = {
                "row": name,
                "rotation": rotation,
                "seqlen": seqlen,
                "subsequence": entries,
                "world_size": args.world,
            }
            for direction in ("forward", "backward"):
                phase = getattr(found, direction)
                row[direction] = {**milliseconds(phase), "bytes": phase.traffic.num_bytes}
            pair = (row["forward"], row["backward"])
            row["both"] = {key: sum(phase[key] for phase in pair) for key in pair[0]}
            rows.append(row | {"single_ms": 1e3 * found.single, "overhead": found.overhead})
    return rows


def milliseconds(phase: PhasePrediction) -> dict[str, float]:
    """Return a direction's milliseconds by the names of lhcp.measure."""
    return {
        "T": 1e3 * phase.real,
        "C": 1e3 * phase.compute,
        "M": 1e3 * phase.communication,
        "exposed": 1e3 * phase.exposed,
    }


def print_rows(rows: list[Row]) -> None:
    """Print the table of milliseconds, predicted."""
    header = ("call", "rotation", "S", "T f", "T b", "T f+b", "exposed", "overhead")
    cells = [
        (
            *(r["row"], r["rotation"], f"{r['subsequence']:,}"),
            *(f"{r[phase]['T']:.3f}" for phase in ("forward", "backward", "both")),
            f"{r['both']['exposed']:.3f}",
            f"{100 * r['overhead']:.1f}%",
        )
        for r in rows
    ]
    print("ms, predicted\n" + text_table(header, cells))


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--calibration", default="H200", help=f"a file, or one of {', '.join(CALIBRATIONS)}"
    )
    parser.add_argument("--element-bytes", type=int, default=2, help="2: bf16; 4: float32")
    parser.add_argument("--row", nargs=2, action="append", default=[], metavar=("NAME", "ARGS"))
    add_json(parser)
    args = parser.parse_args(arguments)
    known = CALIBRATIONS.get(args.calibration) or Calibration.load(args.calibration)
    host = on_one_host(known)
    rows = []
    for name, text in args.row:
        rows += predicted(name, shlex.split(text), host, args.element_bytes)
    print(f"{known.name}: {known.source}")
    print_rows(rows)
    last_line({"calibration": known.name, "source": known.source, "rows": rows}, args.json)


if __name__ == "__main__":
    escape_unprintable()
    main()
