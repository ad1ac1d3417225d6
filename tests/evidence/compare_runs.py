"""Are runs of the training program on several meshes one? Losses and gradient norms by step.

    lhcp train tiny --out build/one
    torchrun --standalone --nproc-per-node 4 -m lhcp train tiny --cp 2 --tp 2 --out build/cut
    python -m tests.evidence.compare_runs build/one build/cut --budget 1e-5 --out build/meshes

The first run is what the others are compared with, at the steps that both did. Ends with status 1
where a loss differs by more than the budget, of itself, or a run did no step.

In bfloat16 nobody knows the budget before: any rounding grows from step to step. `--control` names
runs of the first one's mesh that only round otherwise, as with another `--backend` or `--compile`:
the budget is then twice their largest difference.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.common.arguments import make_parser
from bench.common.card import dated_card
from bench.common.page import Page

SETTLED = 2
"""Steps of a stage whose times say nothing: kernels are chosen and graphs recorded in them."""


@dataclass(frozen=True)
class Steps:
    """What one run wrote of its training steps, by number."""

    name: str
    records: dict[int, dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "Steps":
        """Read metrics.jsonl of a run's folder; of a step that was done twice the last counts."""
        lines = (folder / "two_stages" / "metrics.jsonl").read_text().splitlines()
        steps = [one for one in map(json.loads, lines) if one["kind"] == "step"]
        return cls(folder.name, {one["step"]: one for one in steps})

    def differences(self, other: "Steps", what: str) -> list[float]:
        """Return how far the other's numbers are off, of themselves, at the steps of both."""
        both = sorted(self.records.keys() & other.records.keys())
        pairs = [(self.records[step][what], other.records[step][what]) for step in both]
        return [abs(theirs - ours) / abs(ours) for ours, theirs in pairs]

    def of_stage(self, stage: str) -> list[dict[str, Any]]:
        """Return the steps of a stage that its first ones do not disturb."""
        found = [one for one in self.records.values() if one["stage"] == stage]
        return found[min(SETTLED, len(found) - 1) :]


def budget_of(first: Steps, controls: Sequence[Steps]) -> float:
    """Return twice the largest difference of a loss that rounding alone makes.

    Raises:
        ValueError: a control has no step in common with the first run, or does not differ.
    """
    largest = [max(first.differences(control, "loss"), default=0.0) for control in controls]
    for control, difference in zip(controls, largest, strict=True):
        if not difference:
            raise ValueError(
                f"--control {control.name}: no loss differs from {first.name}'s, so it says "
                "nothing of rounding; take a run of the same steps with another --backend"
            )
    return 2 * max(largest)


def compare(
    runs: Sequence[Steps], budget: float, page: Page, why: str = ""
) -> list[dict[str, Any]]:
    """Write how far each run is from the first; return the rows."""
    first, rows = runs[0], []
    page.table(
        "Against the first run",
        f"Largest difference at a step, of the number itself; at most {budget:.3g} of a loss "
        f"holds{why}.",
        ("run", "steps", "loss", "gradient norm"),
    )
    for run in runs[1:]:
        losses, norms = (first.differences(run, what) for what in ("loss", "grad_norm"))
        if not losses:
            page.refuse(run.name, "no step that the first run did too")
        elif max(losses) > budget:
            page.refuse(run.name, f"a loss differs by {max(losses):.1e}")
        else:
            page.row(run.name, len(losses), f"{max(losses):.1e}", f"{max(norms):.1e}")
        rows.append({"run": run.name, "losses": losses, "grad_norms": norms})
    return rows


def show_steps(runs: Sequence[Steps], page: Page) -> None:
    """Write the losses themselves, and what a step took."""
    page.table("Losses", "Nats per byte.", ("step", "stage", *(run.name for run in runs)))
    for step, record in sorted(runs[0].records.items()):
        losses = [run.records.get(step, {}).get("loss") for run in runs]
        page.row(step, record["stage"], *("-" if x is None else f"{x:.6f}" for x in losses))
    header = ("run", "stage", "fastest step, s", "peak GiB a rank")
    page.table("Steps", f"After the first {SETTLED} of a stage, or the last.", header)
    for run in runs:
        for stage in dict.fromkeys(one["stage"] for one in run.records.values()):
            timed = run.of_stage(stage)
            peak = timed[-1]["peak_gib"]
            said = "-" if peak is None else f"{peak:.1f}"
            page.row(run.name, stage, f"{min(one['seconds'] for one in timed):.3f}", said)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare the runs of the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of --out")
    parser.add_argument("--budget", type=float, default=1e-5, help="of a loss")
    parser.add_argument(
        "--control", nargs="+", type=Path, default=[], help="runs that set the budget: see above"
    )
    parser.add_argument("--note", help="a line of the page")
    parser.add_argument("--out", help="page and JSON are written to this name")
    args = parser.parse_args(arguments)
    if len(args.runs) < 2:
        parser.error("one run: there is nothing to compare it with")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    note = {"note": args.note} if args.note else {}
    page = Page("Training on several meshes", dated_card(device, **note))
    runs = [Steps.read(folder) for folder in args.runs]
    budget, why = args.budget, ""
    if args.control:
        controls = [Steps.read(folder) for folder in args.control]
        runs[1:1] = controls
        budget = budget_of(runs[0], controls)
        names = ", ".join(control.name for control in controls)
        why = f", twice the largest of what only rounds otherwise ({names})"
    rows = compare(runs, budget, page, why)
    show_steps(runs, page)
    page.close(args.out, {"compared": rows, "runs": {run.name: run.records for run in runs}})


if __name__ == "__main__":
    main()
