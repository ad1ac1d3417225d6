"""What the results of knobs say: a row a knob, over seeds, and what differs from the base."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from lhcp.config import LighthouseConfig
from lhcp.training import recovery_results
from lhcp.training.history import History
from lhcp.training.identity import ADDED, Identity
from lhcp.training.knobs import BASE, read_answers
from lhcp.training.recovery import LIGHTHOUSE
from lhcp.training.recovery_report import curve, training_seconds
from lhcp.training.recovery_results import ArmResult
from lhcp.training.retrieval import Found
from lhcp.training.switch import Switch, find_switch

LATELY = 0.1
"""Share of a run over whose end its training loss is compared with the same share before it."""


@dataclass(frozen=True)
class Row:
    """One knob: its finished splits and answers, by seed."""

    results: dict[int, ArmResult]
    found: dict[int, Found]

    @property
    def identity(self) -> Identity:
        """What a knob is: what it shares with no other one."""
        (first, *_) = self.results.values()
        return ADDED | {
            k: v for k, v in first.identity.items() if k not in ("seed", "stages", "data.files")
        }

    @property
    def subsequence(self) -> int:
        """S."""
        (first, *_) = self.results.values()
        return LighthouseConfig(**first.run["lighthouse"]).subsequence_length(first.run["seqlen"])

    @property
    def finals(self) -> dict[int, float]:
        """Last held-out loss in dense mode, by seed."""
        return {seed: curve(r, "dense").losses[-1] for seed, r in self.results.items()}

    @property
    def switches(self) -> list[Switch]:
        """What the switch did, of each seed."""
        found = [find_switch(History(evals=r.evals)) for r in self.results.values()]
        return [switch for switch in found if switch is not None]

    def step_seconds(self, stage: int) -> float:
        """Return the median seconds of a step of the first (0) or second stage, over all seeds."""
        return median(
            s
            for r in self.results.values()
            for s in (
                r.columns["seconds"][: r.stages[0][1]]
                if stage == 0
                else r.columns["seconds"][r.stages[0][1] :]
            )
        )

    @property
    def seconds(self) -> float:
        """Training seconds, mean over seeds."""
        return fmean(training_seconds(r)[-1] for r in self.results.values())

    @property
    def falling(self) -> float:
        """By how much training losses fell lately, mean over seeds: large in the steep phase."""
        falls = []
        for r in self.results.values():
            losses = r.columns["loss"]
            size = max(round(LATELY * len(losses)), 1)
            falls.append(fmean(losses[-size:]) - fmean(losses[-2 * size : -size]))
        return fmean(falls)

    @property
    def asked(self) -> float | None:
        """Share of right digits, mean over seeds; None: it was not asked."""
        return fmean(f.mean for f in self.found.values()) if self.found else None


def read(places: Iterable[Path]) -> dict[str, Row]:
    """Return the knobs with a finished split in folders of launch/knobs.py, by name; base first.

    Several folders may have seeds of one knob.

    Raises:
        FileNotFoundError: a place has none, or no place has the base.
        ValueError: results of one knob are of different experiments.
    """
    paths: dict[str, list[Path]] = {}
    for place in places:
        files = sorted(place.glob("*/*_seed*.jsonl"))
        if not files:
            raise FileNotFoundError(f"{place}: no results of knobs.py (base/NAME_seed0.jsonl)")
        for path in files:
            paths.setdefault(path.parent.name, []).append(path)
    rows = {}
    for name, files in sorted(paths.items(), key=lambda item: (item[0] != BASE, item[0])):
        whole = recovery_results.merge(files)
        splits = {r.seed: r for r in whole if r.arm != LIGHTHOUSE}
        found = {s: f for path in files for s, f in read_answers(path.parent).items()}
        if splits:
            rows[name] = Row(splits, {s: f for s, f in found.items() if s in splits})
    if BASE not in rows:
        raise FileNotFoundError(f"{BASE}: no finished split of the run without a change")
    return rows


def label(row: Row, base: Row) -> str:
    """Return what a knob has changed: "topk=256"; of the run without a change "base"."""
    own, other = row.identity, base.identity
    changed = [
        f"{key.split('.')[-1]}={own.get(key)}"
        for key in {**other, **own}
        if own.get(key) != other.get(key)
    ]
    return ", ".join(changed) or BASE


def differences(row: Row, base: Row) -> list[float]:
    """Return final loss less the base's, of the seeds that both have."""
    return [loss - base.finals[seed] for seed, loss in row.finals.items() if seed in base.finals]
