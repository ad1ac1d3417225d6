"""The cost model's word beside what these ranks measure, after calibrating it on them."""

import argparse
import json
from dataclasses import asdict, replace
from typing import Any

import torch

from bench.common.card import shown_card
from bench.common.gate import gate, refuse
from bench.common.page import last_line
from bench.common.problem import AttentionProblem, Choice
from bench.common.ranks import all_ranks, dtype_of
from bench.rotation.predict_rows import milliseconds
from lhcp.comm.layout import make_layout
from lhcp.comm.mesh import Ranks
from lhcp.cost.calibration import Calibration
from lhcp.cost.choose import PhasePrediction, predict
from lhcp.cost.tables import read_calibration
from lhcp.measure import OverheadReport, measure_overhead
from lhcp.measure.calibrate import Grid, calibrate, with_links
from lhcp.ring.shape import AttentionShape

Row = dict[str, Any]


def measure(args: argparse.Namespace, device: torch.device) -> None:
    """Calibrate, predict, then measure, on these ranks; rank 0 prints both."""
    ranks, dtype = all_ranks(device, args.nodes), dtype_of("auto", device)
    facts = shown_card(device, ranks)
    if args.calibrated is None:
        sizes = grid(args, ranks.world_size, dtype)
        calibration = calibrate(ranks, device, sizes, args.nodes, args.large_message)
    else:
        known = read_calibration(args.calibrated, ranks)
        calibration = with_links(known, ranks, device, args.large_message)
    records = []
    for rotation in args.rotations:
        like = AttentionProblem.of(args, dtype)
        refuse(rotation, gate(Choice(rotation, "auto", ranks), like, device))
        for seqlen in args.seqlens:
            problem = replace(like, seqlen=seqlen)
            records.append(compare(args, ranks, device, rotation, problem, calibration))
            if ranks.rank == 0:
                print_comparison(records[-1])
    if ranks.rank == 0:
        document = {"card": facts, "calibration": json.loads(calibration.text), "records": records}
        last_line(document, None if args.out is None else args.out + ".json")


def grid(args: argparse.Namespace, world_size: int, dtype: torch.dtype) -> Grid:
    """Return the blocks that occur: of all ranks, and of the rings left where heads are shared."""
    worlds = ({world_size, args.nodes, world_size // args.nodes} - {1}) or {1}
    chunks = [n // world // 2 for n in args.seqlens for world in sorted(worlds)]
    lengths = sorted({c for chunk in chunks for c in (chunk, 2 * chunk)})
    return Grid(
        heads=args.heads,
        head_dim=args.head_dim,
        dtype=dtype,
        seqlens=lengths,
        queries=lengths,
        keys=sorted({*lengths, *(n // 2 for n in args.seqlens)}),
    )


def compare(
    args: argparse.Namespace,
    ranks: Ranks,
    device: torch.device,
    rotation: str,
    problem: AttentionProblem,
    calibration: Calibration,
) -> Row:
    """Predict, then measure; milliseconds of T, C, M and exposed by direction."""
    shape = AttentionShape(
        seqlen=problem.seqlen,
        layout=make_layout("zigzag", ranks.world_size),
        num_heads=args.heads,
        num_kv_heads=args.heads,
        head_dim=args.head_dim,
        element_bytes=problem.dtype.itemsize,
        node_size=None if args.nodes == 1 else ranks.world_size // args.nodes,
    )
    predicted = predict(rotation, shape, calibration)
    report = measure_overhead(
        None,
        seqlen=problem.seqlen,
        num_heads=args.heads,
        head_dim=args.head_dim,
        dtype=problem.dtype,
        group=ranks,
        rotation=rotation,
        device=device,
        repeats=args.repeats,
        warmup=1,
        single_seconds=args.single_seconds,
    )
    record: Row = {"rotation": rotation, "seqlen": problem.seqlen}
    record["link"] = asdict(calibration.outer)
    for phase in ("forward", "backward"):
        guess, found = getattr(predicted, phase), report.phase(phase)
        seconds = found.compute.median
        played = with_compute(rotation, shape, calibration, phase, seconds)
        record[phase] = {
            "bytes": found.bytes_per_rank,
            "across_bytes": guess.traffic.across_bytes if args.nodes > 1 else 0,
            "predicted": milliseconds(guess),
            "with_compute": milliseconds(played),
            "measured": {
                "T": 1e3 * found.real.median,
                "C": 1e3 * seconds,
                "calls": [1e3 * calls(report, phase, run) for run in ("compute", "real")],
                "M": 1e3 * found.communication.median,
                "exposed": 1e3 * found.exposed,
            },
        }
    return record


def calls(report: OverheadReport, phase: str, run: str) -> float:
    """Sum the block calls of each step's slowest rank, in a run: "compute", alone, or "real".

    In both, ranks of uneven pace have more than C, where they wait for nobody; in the real one also
    what messages take of compute.
    """
    return sum(
        step.timing.median
        for step in report.steps
        if (step.variant, step.phase, step.kind) == (run, phase, "compute")
    )


def with_compute(
    rotation: str, shape: AttentionShape, calibration: Calibration, phase: str, seconds: float
) -> PhasePrediction:
    """Play a direction with blocks and merges that take the compute's seconds, all slower alike.

    What is exposed is predicted from compute and links: this leaves the links and the schedule.
    """
    factor = 1.0
    for _ in range(8):
        table = replace(
            calibration,
            square=tuple((n, factor * f, factor * b) for n, f, b in calibration.square),
            full=tuple((n, m, factor * f, factor * b) for n, m, f, b in calibration.full),
            merge_bandwidth=calibration.merge_bandwidth / factor,
        )
        found: PhasePrediction = getattr(predict(rotation, shape, table), phase)
        # Copies and the smallest operation stay as they are, so that one step is not enough.
        factor *= seconds / found.compute
    return found


def print_comparison(record: Row) -> None:
    """Print one record, a line a direction."""
    print(f"{record['rotation']} S={record['seqlen']:,}   ms: predicted / measured (ratio)")
    for phase in ("forward", "backward"):
        guess, found = record[phase]["predicted"], record[phase]["measured"]
        cells = [
            f"{name} {guess[name]:.2f} / {found[name]:.2f} "
            f"({found[name] / guess[name] if guess[name] > 0 else float('nan'):.2f})"
            for name in guess
        ]
        print(f"  {phase:<9} " + "   ".join(cells), flush=True)
