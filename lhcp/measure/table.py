"""The table of `measure_overhead`: what cannot be told from noise is blank."""

from collections.abc import Sequence
from typing import Any

from lhcp.measure.timings import PhaseReport, StepReport, Timing, is_noise

LEGEND = (
    "T the rotation as it is; C the same code, no messages; M the messages alone; T1/W one device",
    "over the ranks; overhead T / (T1/W) - 1; exposed T - C; overlap 1 - (T - C) / M, the share of",
    "the messages that hid; contention T - C less the waits. Blank: not to be told from noise.",
)


def setting_line(setting: dict[str, Any]) -> str:
    """Return what was measured, in a line."""
    s = setting
    return (
        f"{s['rotation']} | {s['layout']} | W={s['world_size']} | S={s['subsequence']:,} | "
        f"N={s['seqlen']:,} | B={s['batch']} H={s['num_heads']} Hk={s['num_kv_heads']} "
        f"D={s['head_dim']} {s['dtype']} | {s['backend']} | {s['device']} | median of "
        f"{s['repeats']} x {s['calls']}, slowest rank"
    )


def phase_rows(phases: Sequence[PhaseReport], head: bool = True) -> list[str]:
    """Return a row for each phase, under the names of the columns."""
    names = ("ms", "T", "C", "M", "T1/W", "overhead", "exposed", "overlap", "contention")
    header = [_row(*names) + f"{'MB/rank':>10}{'GB/s':>8}"] if head else []
    return [*header, *(_phase_row(p) for p in phases), *_host_rows(phases)]


def step_rows(steps: Sequence[StepReport]) -> list[str]:
    """Return a row for each step of each stage, T, C and M."""
    rows: dict[tuple[str, str, int], dict[str, Timing]] = {}
    for step in steps:
        column = "real" if step.variant == "layer" else step.variant
        rows.setdefault((step.stage, step.kind, step.step), {}).setdefault(column, step.timing)
    variants = ("real", "compute", "communication")
    return [
        _row("step", "T", "C", "M"),
        *(
            _row(f"{stage} {kind} {step}", *(_ms(t[v].median) if v in t else "-" for v in variants))
            for (stage, kind, step), t in rows.items()
        ),
    ]


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
    hidden = is_noise(p.exposed, p.exposed_error)
    # Of messages that take no longer than the noise no share can be told.
    sure = p.exposed_error is None or p.exposed_error < 0.25 * p.communication.median
    sent = "-" if p.bytes_per_rank is None else f"{p.bytes_per_rank / 1e6:.2f}"
    rate = "-" if p.gigabytes_per_second is None else f"{p.gigabytes_per_second:.2f}"
    return (
        _row(
            f"{p.phase} (T +-{100 * spread:.0f}%)",
            _ms(p.real.median),
            _ms(p.compute.median),
            _ms(p.communication.median),
            "-" if p.single is None else _ms(p.single.median / p.world_size),
            _shown(p.overhead, "%", is_noise(p.overhead or 0.0, p.overhead_error)),
            _shown(p.exposed, "ms", hidden),
            _shown(p.overlap, "%", not sure),
            _shown(p.contention, "ms", hidden),
        )
        + f"{sent:>10}{rate:>8}"
    )


def _shown(value: float | None, unit: str, blank: bool) -> str:
    """Return a derived number: "-" where there is none, nothing where it is noise."""
    if value is None:
        return "-"
    if blank:
        return ""
    return f"{100 * value:.1f}%" if unit == "%" else _ms(value)
