"""For each length, how to split GPUs over sequences and ranks of one: the most tokens a second.

    python -m bench.scaling.plan                        # 32 and 256 GPUs, H200 and B200, 256K to 4M
    python -m bench.scaling.plan --gpus 64 --seqlens 1048576 --calibrations mine.json --room-gib 80

Every (dp, cp) whose sequences are no more than --batch-tokens together, and whose rank has room, by
the cost model with the fastest rotation of each: attention layers alone, since the matrix products
of the rest take the same however tokens are split. The last line is JSON.
"""

import argparse
from collections.abc import Iterator

from bench.common.arguments import make_parser
from bench.common.page import Page, command, today
from bench.scaling.curves import SEQLENS, tokens
from bench.scaling.layer import CONFIG, HEAD_DIM, HEADS, LAYERS, MODES, NODE, Question, Row, layer
from lhcp.console import escape_unprintable
from lhcp.cost.calibration import Calibration
from lhcp.cost.tables import read_or_built_in
from lhcp.machine import commit

ROOM = {"H200": 141e9 / 2**30, "B200": 180e9 / 2**30}
"""GiB of a GPU."""
SPARE = 0.9
"""Of which a run uses so much at most."""
TOKENS = 2**17, 2**24
"""Of a step, where nothing is said: for each GPU, and at most."""


def splits(gpus: int, seqlen: int, batch_tokens: int) -> Iterator[tuple[int, int]]:
    """Yield (dp, cp): whole nodes or parts of one, and no more tokens than a batch has."""
    cp = 1
    while cp <= gpus:
        chunks = 2 * cp
        fits = CONFIG.num_strata % chunks == 0 and (cp <= NODE or cp % NODE == 0)
        if gpus % cp == 0 and fits and gpus // cp * seqlen <= batch_tokens:
            yield gpus // cp, cp
        cp *= 2


def options(asked: Question, gpus: int, batch_tokens: int, room: float) -> list[Row]:
    """Return every split that fits, the most tokens a second first; `cp` of asked is not read."""
    found = []
    for dp, cp in splits(gpus, asked.seqlen, batch_tokens):
        row = layer(Question(asked.mode, asked.seqlen, cp, asked.calibration))
        # Recomputed: of each layer its input is kept, and one layer is at work.
        kept = LAYERS * asked.seqlen // cp * HEADS * HEAD_DIM * 2 / 2**30
        row |= {"dp": dp, "gpus": gpus, "memory_gib": kept + row["memory_gib"]}
        row["tokens_s"] = dp * asked.seqlen / (LAYERS * row["ms"] / 1e3)
        if row["memory_gib"] <= SPARE * room:
            found.append(row)
    return sorted(found, key=lambda row: -row["tokens_s"])


def show(page: Page, calibration: Calibration, room: float, args: argparse.Namespace) -> list[Row]:
    """Show the best split of each length and the next best, for each number of GPUs."""
    best = []
    for gpus, batch_tokens in zip(args.gpus, args.batch_tokens, strict=True):
        page.table(
            f"{calibration.name}, {gpus} GPUs",
            f"At most {batch_tokens:,} tokens a step; tokens a second of {LAYERS} such layers.",
            (
                *("mode", "N", "best: dp x cp", "rotation", "tokens/s", "layer, ms", "binds"),
                *("GiB a rank", "next best, of it"),
            ),
        )
        for mode in MODES:
            for seqlen in args.seqlens:
                asked = Question(mode, seqlen, 1, calibration)
                rows = options(asked, gpus, batch_tokens, room)
                if not rows:
                    page.row(mode, tokens(seqlen), "none fits", *("-",) * 6)
                    continue
                first = rows[0]
                others = ", ".join(
                    f"{r['dp']} x {r['cp']} {r['rotation']} {r['tokens_s'] / first['tokens_s']:.2f}"
                    for r in rows[1:3]
                )
                page.row(
                    *(mode, tokens(seqlen), f"{first['dp']} x {first['cp']}", first["rotation"]),
                    *(f"{first['tokens_s'] / 1e6:.2f}M", f"{first['ms']:.2f}", first["binds"]),
                    *(f"{first['memory_gib']:.0f}", others or "-"),
                )
                best.append({"best": first, "others": rows[1:]})
    return best


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--gpus", type=int, nargs="*", default=[32, 256])
    parser.add_argument("--seqlens", type=int, nargs="*", default=list(SEQLENS))
    parser.add_argument("--calibrations", nargs="*", default=["H200", "B200"])
    parser.add_argument(
        "--batch-tokens",
        type=int,
        nargs="*",
        help=f"of a step, at most: for each of --gpus; by default {TOKENS[0]:,} a GPU, and "
        f"{TOKENS[1]:,} at most",
    )
    parser.add_argument("--room-gib", type=float, help="memory of a GPU, if it is no built-in one")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--out", help="write <out>.md and <out>.json")
    args = parser.parse_args()
    if args.batch_tokens is None:
        args.batch_tokens = [min(TOKENS[0] * gpus, TOKENS[1]) for gpus in args.gpus]
    unknown = [name for name in args.calibrations if name not in ROOM]
    if unknown and args.room_gib is None:
        parser.error(f"--room-gib: how much memory has a GPU of {unknown[0]}?")
    if len(args.batch_tokens) != len(args.gpus):
        parser.error(f"--batch-tokens: as many as --gpus, which are {len(args.gpus)}")
    return args


def main() -> None:
    args = parse()
    sizes = f"L={CONFIG.num_levels}, p={CONFIG.pool_factor}, k={CONFIG.topk}"
    facts = {
        "date": today(),
        "command": command(),
        "commit": commit(),
        "predicted": f"not measured; {LAYERS} layers, 8 heads of 128, bf16, {sizes}, recomputed",
        "nodes": f"{NODE} GPUs",
        "launches": "call by call" if args.eager else "CUDA graphs",
    }
    page = Page("How to split GPUs over sequences and ranks, predicted", facts)
    records = []
    for name in args.calibrations:
        table = read_or_built_in(name)
        room = args.room_gib or ROOM[name]
        records += show(page, table if args.eager else table.in_graphs(), room, args)
    page.close(args.out, records)


if __name__ == "__main__":
    escape_unprintable()
    main()
