"""What `measure_overhead` returns: times of a rotation and of its twins, as table and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

PHASES = ("forward", "backward", "both")
DERIVED = ("overhead", "exposed", "overlap", "contention", "host_sets_the_pace")
"""Properties of a phase that go into the JSON beside its fields."""


@dataclass(frozen=True)
class Timing:
    """Seconds over the repeats; each repeat counts its slowest rank."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """Summarise at least one repeat."""
        ordered = sorted(seconds)

        def quantile(share: float) -> float:
            at = share * (len(ordered) - 1)
            below = int(at)
            above = min(below + 1, len(ordered) - 1)
            return ordered[below] + (at - below) * (ordered[above] - ordered[below])

        return cls(quantile(0.5), quantile(0.25), quantile(0.75))


@dataclass(frozen=True)
class PhaseReport:
    """One direction, or both in one go: the real thing beside its twins."""

    phase: str
    """"forward", "backward" or "both"."""
    real: Timing
    """T: the rotation as it is."""
    compute: Timing
    """C: the same code, sending nothing."""
    communication: Timing
    """M: the same messages, without attention."""
    single: Timing | None
    """T1: one device on the whole; scaled up if the report says so; None: it does not fit."""
    waited: float | None
    """Seconds in which T's slowest rank stood still for messages; None where it is not timed."""
    bytes_per_rank: int | None
    """What one rank sends; None where the cost model does not know the rotation."""
    world_size: int
    host: float | None = None
    """Seconds that T's slowest host takes to launch a call; None where it computes itself."""

    @property
    def host_sets_the_pace(self) -> bool:
        """Whether T is what the host takes: then neither messages nor compute are what costs."""
        return self.host is not None and self.real.median < 1.15 * self.host

    @property
    def overhead(self) -> float | None:
        """W T / T1 - 1: what the rotation costs over a device that needs none."""
        if self.single is None:
            return None
        return self.world_size * self.real.median / self.single.median - 1

    @property
    def exposed(self) -> float:
        """T - C, seconds: communication that did not hide behind compute."""
        return self.real.median - self.compute.median

    @property
    def overlap(self) -> float | None:
        """1 - (T - C) / M: the share of the communication that hid; None without any."""
        if self.communication.median == 0:
            return None
        return 1 - self.exposed / self.communication.median

    @property
    def contention(self) -> float | None:
        """T - C - waited, seconds: compute that ran slower because messages were under way."""
        return None if self.waited is None else self.exposed - self.waited

    @property
    def gigabytes_per_second(self) -> float | None:
        """Rate of M: what one rank sends over the time that sending takes."""
        if not self.bytes_per_rank or self.communication.median == 0:
            return None
        return self.bytes_per_rank / self.communication.median / 1e9


@dataclass(frozen=True)
class StepReport:
    """One step of one stage in one of the three runs."""

    variant: str
    """"real", "compute" or "communication", or "layer", the real thing with all its stages."""
    phase: str
    stage: str
    kind: str
    """"compute" or "wait"."""
    step: int
    timing: Timing


@dataclass(frozen=True)
class Mark:
    """When one step ran on one rank, in seconds since that rank left the barrier."""

    rank: int
    variant: str
    stage: str
    kind: str
    step: int
    start: float
    stop: float


@dataclass(frozen=True, kw_only=True)
class OverheadReport:
    """All of a measurement; equal on every rank."""

    setting: dict[str, Any]
    """Sizes, choices and versions, by name."""
    phases: tuple[PhaseReport, ...]
    """Of the attention over the sub-sequence: forward, backward, both."""
    layer: tuple[PhaseReport, ...]
    """Of the whole lighthouse layer, where a config was given."""
    steps: tuple[StepReport, ...]
    timeline: tuple[Mark, ...]
    """The middle repeat of forward + backward, all ranks, of the real thing and of M."""
    single_seqlen: int
    """The length at which T1 was measured: shorter than S where it was extrapolated by pairs."""

    @property
    def extrapolated(self) -> bool:
        """Whether T1 was measured on a shorter sequence."""
        return self.single_seqlen < int(self.setting["subsequence"])

    def phase(self, name: str) -> PhaseReport:
        """Return the attention's forward, backward or both."""
        return self.phases[PHASES.index(name)]

    def table(self) -> str:
        """Return the report as plain text."""
        s = self.setting
        lines = [
            f"{s['rotation']} | {s['layout']} | W={s['world_size']} | S={s['subsequence']:,} | "
            f"N={s['seqlen']:,} | B={s['batch']} H={s['num_heads']} Hk={s['num_kv_heads']} "
            f"D={s['head_dim']} {s['dtype']} | {s['backend']} | {s['device']} | median of "
            f"{s['repeats']} x {s['calls']}, slowest rank",
            _row("ms", "T", "C", "M", "T1/W", "overhead", "exposed", "overlap", "contention")
            + f"{'MB/rank':>10}{'GB/s':>8}",
            *(_phase_row(p) for p in self.phases),
            *_host_rows(self.phases),
        ]
        if self.extrapolated:
            lines.append(
                f"T1 was measured at S={self.single_seqlen:,} and scaled by the number of pairs."
            )
        if self.layer:
            lines.append("the whole layer")
            lines += [*(_phase_row(p) for p in self.layer), *_host_rows(self.layer)]
        lines.append(_row("step", "T", "C", "M"))
        lines += self._step_rows()
        return "\n".join(lines)

    def _step_rows(self) -> list[str]:
        rows: dict[tuple[str, str, int], dict[str, Timing]] = {}
        for step in self.steps:
            column = "real" if step.variant == "layer" else step.variant
            rows.setdefault((step.stage, step.kind, step.step), {}).setdefault(column, step.timing)
        return [
            _row(
                f"{stage} {kind} {step}",
                *(
                    _ms(t[v].median) if v in t else "-"
                    for v in ("real", "compute", "communication")
                ),
            )
            for (stage, kind, step), t in rows.items()
        ]

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
                fields = {"host": None} | {
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


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3f}"


def _row(head: str, *cells: str) -> str:
    return f"{head:<28}" + "".join(f"{cell:>11}" for cell in cells)


def _host_rows(phases: Sequence[PhaseReport]) -> list[str]:
    """Say of which phases the host, not the GPU, is what is measured."""
    slow = [p for p in phases if p.host_sets_the_pace]
    if not slow:
        return []
    times = ", ".join(f"{p.phase} {_ms(p.host or 0.0)}" for p in slow)
    return [
        f"The host sets the pace: ms to launch {times}. The GPUs wait for it, so these times say "
        "little of messages; in training, lhcp.graphed(model) launches a layer at once."
    ]


def _phase_row(p: PhaseReport) -> str:
    spread = max(p.real.high - p.real.median, p.real.median - p.real.low) / p.real.median
    sent = "-" if p.bytes_per_rank is None else f"{p.bytes_per_rank / 1e6:.2f}"
    rate = "-" if p.gigabytes_per_second is None else f"{p.gigabytes_per_second:.2f}"
    return (
        _row(
            f"{p.phase} (T +-{100 * spread:.0f}%)",
            _ms(p.real.median),
            _ms(p.compute.median),
            _ms(p.communication.median),
            "-" if p.single is None else _ms(p.single.median / p.world_size),
            "-" if p.overhead is None else f"{100 * p.overhead:.1f}%",
            _ms(p.exposed),
            "-" if p.overlap is None else f"{100 * p.overlap:.0f}%",
            "-" if p.contention is None else _ms(p.contention),
        )
        + f"{sent:>10}{rate:>8}"
    )
