"""What `measure_overhead` returns: its verdict, its table, its JSON."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from lhcp.measure.table import LEGEND, phase_rows, setting_line, step_rows
from lhcp.measure.timings import DERIVED, Mark, PhaseReport, StepReport, Timing
from lhcp.measure.verdict import Step, Verdict, judge


@dataclass(frozen=True, kw_only=True)
class OverheadReport:
    """All of a measurement; equal on every rank."""

    setting: dict[str, Any]
    """Sizes, choices and versions, by name."""
    phases: tuple[PhaseReport, ...]
    """Of the attention over the sub-sequence: forward, backward, both; both alone where there was
    no time for more."""
    layer: tuple[PhaseReport, ...]
    """Of the whole lighthouse layer, where a config was given."""
    steps: tuple[StepReport, ...] = field(repr=False)
    timeline: tuple[Mark, ...] = field(repr=False)
    """The middle repeat of forward + backward, all ranks, of the real thing and of M."""
    single_seqlen: int
    """The length at which T1 was measured: shorter than S where it was extrapolated by pairs."""

    @property
    def extrapolated(self) -> bool:
        """Whether T1 was measured on a shorter sequence."""
        return self.single_seqlen < int(self.setting["subsequence"])

    def phase(self, name: str) -> PhaseReport:
        """Return the attention's forward, backward or both.

        Raises:
            ValueError: it was not measured.
        """
        for phase in self.phases:
            if phase.phase == name:
                return phase
        measured = ", ".join(phase.phase for phase in self.phases)
        raise ValueError(f"{name!r} was not measured, but {measured}: give more of a budget")

    def verdict(self, step_seconds: float | None = None, num_layers: int = 1) -> Verdict:
        """Return what the rotation costs, in a sentence, and what to change.

        Args:
            step_seconds: of a training step of yours, to be told the share of it.
            num_layers: attention layers of such a step, of the sizes that were measured.
        """
        phase = (self.layer or self.phases)[-1]
        whole = bool(self.layer) and phase.single is not None
        return judge(
            phase if whole else self.phases[-1],
            "the layer" if whole else "the attention",
            extrapolated=self.extrapolated and not whole,
            step=None if step_seconds is None else Step(step_seconds, num_layers),
        )

    def __str__(self) -> str:
        """Return the verdict and what it was measured at; `table` has the numbers."""
        return f"{self.verdict()}\n{setting_line(self.setting)}"

    def table(self) -> str:
        """Return the numbers as plain text, with a legend."""
        lines = [
            setting_line(self.setting),
            *phase_rows(self.phases),
            *(["the whole layer", *phase_rows(self.layer, head=False)] if self.layer else []),
        ]
        if self.extrapolated:
            lines.append(
                f"T1 was measured at S={self.single_seqlen:,} and scaled by the number of pairs."
            )
        return "\n".join([*lines, *LEGEND, *step_rows(self.steps)])

    def to_json(self) -> str:
        """Return the report as one line of JSON, the derived numbers included."""
        whole = asdict(self)
        for name in ("phases", "layer"):
            for row, phase in zip(whole[name], getattr(self, name), strict=True):
                for derived in DERIVED:
                    row[derived] = getattr(phase, derived)
                row["gigabytes_per_second"] = phase.gigabytes_per_second
        whole["extrapolated"] = self.extrapolated
        return json.dumps(whole)

    @classmethod
    def from_json(cls, text: str) -> "OverheadReport":
        """Return the report that `to_json` wrote."""
        whole = json.loads(text)

        def phases(rows: list[dict[str, Any]]) -> tuple[PhaseReport, ...]:
            made = []
            for row in rows:
                # A report of before has no host.
                fields = {
                    name: row[name] for name in PhaseReport.__dataclass_fields__ if name in row
                }
                for name in ("real", "compute", "communication", "single"):
                    fields[name] = fields[name] and Timing(**fields[name])
                made.append(PhaseReport(**fields))
            return tuple(made)

        return cls(
            setting=whole["setting"],
            phases=phases(whole["phases"]),
            layer=phases(whole["layer"]),
            steps=tuple(
                StepReport(**s | {"timing": Timing(**s["timing"])}) for s in whole["steps"]
            ),
            timeline=tuple(Mark(**mark) for mark in whole["timeline"]),
            single_seqlen=whole["single_seqlen"],
        )
