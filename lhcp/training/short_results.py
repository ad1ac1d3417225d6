"""What the results of short stages say: for each seed, what all that followed began from."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from lhcp.training import recovery_results
from lhcp.training.recovery_page import number, table
from lhcp.training.recovery_report import curve, training_seconds
from lhcp.training.recovery_results import ArmResult
from lhcp.training.retrieval import Found
from lhcp.training.short_stage import ANSWERS, RESULT, SHORT


@dataclass(frozen=True)
class ShortResult:
    """The short stage of one seed."""

    result: ArmResult
    found: Found | None
    """What its model answered; None: it was not asked."""

    def cells(self, contexts: Iterable[int]) -> list[str]:
        """Return its row of the table."""
        held = curve(self.result, "dense")
        seconds = self.result.columns["seconds"]
        shares = (
            {}
            if self.found is None
            else dict(zip(self.found.asked.contexts, map(fmean, self.found.accuracy), strict=True))
        )
        return [
            str(self.result.seed),
            f"{len(seconds):,}",
            f"{median(seconds):.4f}",
            f"{training_seconds(self.result)[-1]:.0f}",
            ", ".join(f"{s:,.0f}: {x:.2f}" for s, x in zip(held.steps, held.losses, strict=True)),
            *(number(shares.get(context)) for context in contexts),
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the numbers, JSON-ready; steps one by one stay in the results file."""
        kept = {k: v for k, v in asdict(self.result).items() if k not in ("columns", "identity")}
        told = None if self.found is None else self.found.to_json()
        return kept | {"seconds": training_seconds(self.result)[-1], "passkey": told}


def read_short(places: Iterable[Path]) -> list[ShortResult]:
    """Return the finished short stages in folders of experiments, by seed; none where none is."""
    found: dict[int, ShortResult] = {}
    for path in sorted(path for place in places for path in place.glob(f"short_seed*/{RESULT}")):
        result = recovery_results.read(path)[SHORT]
        answers = path.with_name(ANSWERS)
        told = Found.from_json(json.loads(answers.read_text())) if answers.exists() else None
        found[result.seed] = ShortResult(result, told)
    return [found[seed] for seed in sorted(found)]


def short_section(shorts: Sequence[ShortResult]) -> list[str]:
    """Return the page's section on them; nothing where there is none."""
    if not shorts:
        return []
    run = shorts[0].result.run
    contexts = sorted({c for s in shorts if s.found is not None for c in s.found.asked.contexts})
    return table(
        "Short stage",
        f"What all begins from: dense, {run['global_batch']} x {run['seqlen']:,} tokens a step, "
        f"rate {run['optim']['lr']:g}. Held-out losses are of {run['seqlen']:,} tokens; its "
        "seconds are in no other table. Then the share of right digits by context.",
        [
            *("seed", "steps", "s a step", "seconds", "held-out loss by step"),
            *(f"passkey at {context:,}" for context in contexts),
        ],
        [short.cells(contexts) for short in shorts],
    )
