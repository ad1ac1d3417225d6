"""Provoke every fault of tests/faults/rows.py, and write the table of what its user sees.

    python -m tests.evidence.fault_table --out bench/results/faults_cpu_DATE

For each fault: how it is provoked, what is printed and after how long, what survives. Ends with
status 1, naming the faults that were silent, took too long or lost more than they may.

With two GPUs or more the ranks use NCCL, and faults are left out to which that makes no difference,
or which need more of them. Four ranks share one GPU where NCCL, from 2.30 on, lets them:

    NCCL_MULTI_RANK_GPU_ENABLE=1 LD_PRELOAD=libnccl.so.2 CUDA_VISIBLE_DEVICES=0 python -m \\
    tests.evidence.fault_table --only "of 4"
"""

import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench.common.arguments import make_parser
from bench.common.card import dated_card
from bench.common.page import Page
from lhcp.console import escape_unprintable
from tests.faults.gpus import by_nccl
from tests.faults.provoke import goes_on_after
from tests.faults.rows import FAULTS, Fault, silent
from tests.faults.runs import Outcome


def shown(fault: Fault, outcome: Outcome) -> str:
    """Return the line of what was printed that has what must be said, without folders."""
    wanted = fault.shown or fault.says[0]
    text = outcome.text
    at = text.find(wanted)
    if at < 0:
        return f"NOT SAID: {wanted}"
    ends = r" its main thread: | Traceback | rank \d+: \w+: | lighthouse +\d| Process \w+-\d"
    line = re.split(ends, text[at:])[0]
    # Folders of this machine say nothing.
    line = re.sub(r"/\S*/(run|two_stages|disk|text\d)", r"\1", line).replace("|", "/").strip()
    return line if len(line) <= 240 else f"{line[:240]} ..."


def do(fault: Fault) -> dict[str, Any]:
    """Provoke one fault; return its row."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            outcome = fault.provoke(folder)
        except (PermissionError, AssertionError) as error:
            # Of the second kind are runs that did not get as far as they should.
            return {"fault": fault.name, "wrong": f"not provoked: {str(error)[:200]}"}
        wrong, after = silent(fault, outcome), ""
        if fault.goes_on:
            step = goes_on_after(folder)
            after = f" (step {step} of at least 30)"
            wrong = wrong or ("" if step >= 24 else f"it goes on after step {step}")
    return {
        "fault": fault.name,
        "how": fault.how,
        "sees": shown(fault, outcome),
        "seconds": outcome.seconds,
        "status": outcome.codes,
        "survives": fault.survives + after,
        "wrong": wrong,
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--only", default="", help="faults whose name: how has this, a regular expression"
    )
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), help="this one of so many")
    parser.add_argument("--beside", type=int, default=1, help="faults provoked at once")
    parser.add_argument("--out", help="write <out>.md and <out>.json")
    args = parser.parse_args()
    nccl = by_nccl(2)
    device = torch.device("cuda" if nccl else "cpu")
    ranks = f"1 to 4, {'NCCL' if nccl else 'gloo'}; {args.beside} faults at once"
    facts = dated_card(device, ranks=ranks, sizes="recipe tiny, N=256")
    page = Page("Faults: what their user sees, and what survives", facts)
    page.table(
        "Faults",
        "Seconds from the fault, or from the start of a run that cannot be, to the end of the last "
        "rank that ended. Status of each rank; less than 0 is a signal's, None was frozen.",
        ("fault", "how", "what is seen", "s", "status", "what survives", "verdict"),
    )
    faults = [one for one in FAULTS if re.search(args.only, f"{one.name}: {one.how}")]
    if nccl:
        faults = [one for one in faults if by_nccl(one.world)]
    faults = faults[args.part[0] :: args.part[1]]
    rows = []
    with ThreadPoolExecutor(args.beside) as several:
        # Each is printed when it is there: a table that is cut off has what was found.
        for fault, row in zip(faults, several.map(do, faults), strict=True):
            verdict = row["wrong"] or "as it must be"
            if row["wrong"]:
                page.wrong.append(f"{fault.name}: {row['wrong']}")
            cells = [row.get(name, "-") for name in ("how", "sees")]
            seconds = f"{row['seconds']:.1f}" if "seconds" in row else "-"
            ends = (seconds, row.get("status", "-"), row.get("survives", "-"), verdict)
            page.row(fault.name, *cells, *ends)
            rows.append(row)
    silent_ones = sum(bool(row["wrong"]) for row in rows)
    page.line("")
    page.line(f"{len(rows)} faults provoked, {silent_ones} not as they must be.")
    page.close(args.out, rows)


if __name__ == "__main__":
    escape_unprintable()
    main()
