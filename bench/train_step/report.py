"""What a training step's command prints and writes: lines, a dated page, JSON, two pictures."""

import json
from pathlib import Path
from typing import Any

from bench.common.figures import pyplot, save
from bench.common.page import Page
from bench.train_step.arithmetic import Point, Row, crossover, paper_hours
from bench.train_step.profile import GROUPS
from lhcp.page import write_page

_HEADS = (
    *("N", "kept", "k", "S", "dense s", "lighthouse s", "tokens/s dense", "tokens/s lighthouse"),
    *("GiB dense", "GiB lighthouse", "speed-up", "limit"),
)
_COLOURS = ("#44aa99", "#4477aa", "#ddaa33", "#cc6677", "#882255", "#999999", "#dddddd")


def cells(row: Row) -> list[str]:
    """Return one row of the table as text."""
    kept = "inputs" if row["checkpointed"] else "all"
    if "does_not_fit" in row:
        return [f"{row['seqlen']:,}", kept, "does not fit", *[""] * (len(_HEADS) - 3)]
    dense, light = row.get("dense", {}), row["lighthouse"]
    config = row["lighthouse_config"]

    def seconds(one: Row) -> str:
        if "seconds" not in one:
            return "-"
        if "extrapolated" in one:
            return f"({one['seconds']:.3g})"
        text = f"{one['seconds']:.4g}"
        spread = (one["most"] - one["least"]) / one["seconds"]
        text += f" ±{50 * spread:.1f}%" if one["repeats"] > 1 else " (once)"
        # Waiting for the host: the GPU would be faster.
        return text + ("*" if one["host_seconds"] > 0.9 * one["seconds"] else "")

    return [
        f"{row['seqlen']:,}",
        kept,
        f"{config['topk']:,}",
        f"{row['subsequence']:,}",
        seconds(dense),
        seconds(light),
        f"{row['seqlen'] / dense['seconds']:,.0f}" if dense else "-",
        f"{light['tokens_per_second']:,.0f}",
        f"{dense['peak_gib']:.1f}" if "peak_gib" in dense else "-",
        f"{light['peak_gib']:.1f}",
        f"{row['speedup']:.2f}x" if dense else "-",
        f"{row['limit_speedup']:.2f}x" if dense else "-",
    ]


def live(row: Row) -> str:
    """Return a line to print once a row is measured, each number by its name."""
    pairs = zip(_HEADS, cells(row), strict=True)
    return ", ".join(f"{head} {text}" for head, text in pairs if text)


def points(rows: list[Row], *, checkpointed: bool | None = None) -> list[Point]:
    """Return rows with both times: one a length, without checkpointing unless one is named."""
    chosen: dict[int, Point] = {}
    for row in sorted(rows, key=lambda one: one["checkpointed"]):
        if "speedup" in row and checkpointed in (None, row["checkpointed"]):
            point = Point(row["seqlen"], row["dense"]["seconds"], row["lighthouse"]["seconds"])
            chosen.setdefault(row["seqlen"], point)
    return sorted(chosen.values(), key=lambda point: point.seqlen)


def results(rows: list[Row]) -> dict[str, Any]:
    """Work out what follows from the table by arithmetic."""
    hours = {point.seqlen: paper_hours(point) for point in points(rows)}
    return {"crossover": crossover(points(rows, checkpointed=False)), "gpu_hours": hours}


def page(document: dict[str, Any], stem: str) -> Page:
    """Make the page of the whole result."""
    card, rows = document["card"], document["rows"]
    title = f"One training step, {card['device']}, {card['backend']}, {document['date']}"
    made = Page(title, card, shown=False)
    made.table(
        "Dense against lighthouse",
        "Batch 1. kept: what the backward finds, all activations or only each block's input. In "
        "parentheses: extrapolated with a + bN + cN^2 through the dense lengths that were run. "
        "±: half the spread over the median. *: the host, not the GPU, sets the pace. limit: the "
        "dense step with each lighthouse layer's attention replaced by the kernel on S tokens and "
        "the bytes that must move. From a million tokens on no layer is dense, L=4.",
        _HEADS,
        map(cells, rows),
    )
    cross = document.get("crossover")
    where = f"at {cross:,.0f} tokens" if cross else "not between the measured lengths"
    gate = json.dumps(document["gate"])
    for text in (
        f"Gate: errors against fp32, compiled and eager: `{gate}`",
        f"Crossover: {where}.",
    ):
        made.line("")
        made.line(text)
    hours = document.get("gpu_hours", {})
    made.table(
        "The paper's 10k + 6k steps against 16k dense ones, by arithmetic",
        "GPU hours at the paper's 3.1M tokens a step, from the times of one sequence.",
        ("N", "10k lighthouse + 6k dense", "16k dense", "ratio"),
        (
            (f"{int(n):,}", f"{two:,.0f}", f"{dense:,.0f}", f"{dense / two:.2f}x")
            for n, (two, dense) in hours.items()
        ),
    )
    if document["profiles"]:
        _profiles(made, document, stem)
    if len(hours) > 1:
        made.line(f"\n![speed-up against length]({stem}_speedup.png)")
    return made


def _profiles(made: Page, document: dict[str, Any], stem: str) -> None:
    profiles = document["profiles"]
    made.table(
        f"Where a step's time goes, {document['profiled_at']:,} tokens, ms",
        "",
        ("", *profiles),
        (
            (group, *(f"{1e3 * found['groups'][group]:.1f}" for found in profiles.values()))
            for group in GROUPS
        ),
    )
    made.line(f"\n![one step's time]({stem}_profile.png)")
    for mode, found in profiles.items():
        made.table(
            f"Longest kernels, {mode}",
            "",
            ("kernel", "ms", "calls"),
            (
                (f"`{name[:90]}`", f"{1e3 * seconds:.2f}", calls)
                for name, seconds, calls in found["kernels"][:20]
            ),
        )


def write(document: dict[str, Any], folder: Path) -> None:
    """Write page, JSON and pictures; called after each length, so that nothing is lost."""
    folder.mkdir(parents=True, exist_ok=True)
    card = document["card"]
    device = card["device"].split()[-1].lower()
    stem = f"train_step_{device}_{document['date']}_{card['backend']}"
    (folder / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n")
    write_page(folder / f"{stem}.md", page(document, stem).markdown)
    if len(points(document["rows"])) > 1:
        draw_speedup(document, folder / f"{stem}_speedup.png")
    if document["profiles"]:
        draw_profile(document, folder / f"{stem}_profile.png")


def draw_speedup(document: dict[str, Any], path: Path) -> None:
    """Draw speed-up against length, measured and at the limit."""
    figure, axes = pyplot().subplots(figsize=(7, 4.5))
    for checkpointed, marker in ((False, "o"), (True, "s")):
        rows = [row for row in document["rows"] if row["checkpointed"] == checkpointed]
        rows = sorted((row for row in rows if "speedup" in row), key=lambda row: row["seqlen"])
        if not rows:
            continue
        name = "block inputs kept" if checkpointed else "all activations kept"
        lengths = [row["seqlen"] for row in rows]
        axes.plot(lengths, [row["limit_speedup"] for row in rows], "--", color="#999999")
        axes.plot(lengths, [row["speedup"] for row in rows], marker=marker, label=name)
        for row in rows:
            guessed = "extrapolated" in row["dense"]
            text = f"{row['speedup']:.2f}" + ("*" if guessed else "")
            axes.annotate(
                text,
                (row["seqlen"], row["speedup"]),
                xytext=(0, -13 if checkpointed else 6),
                textcoords="offset points",
                fontsize=7,
                ha="center",
            )
    axes.plot([], [], "--", color="#999999", label="every layer at its limit")
    axes.axhline(1, color="black", linewidth=0.6)
    lengths = sorted({row["seqlen"] for row in document["rows"]})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(lengths, [f"{n // 1024}K" for n in lengths], fontsize=7)
    axes.set_yticks([1, 2, 4, 8, 16, 32], ["1x", "2x", "4x", "8x", "16x", "32x"])
    axes.minorticks_off()
    axes.set_xlabel("tokens")
    axes.set_ylabel("dense step / lighthouse step")
    card = document["card"]
    axes.set_title(f"{card['device']}, {card['backend']} in both; * dense extrapolated", fontsize=9)
    axes.legend(fontsize=8)
    save(figure, path, dpi=150)


def draw_profile(document: dict[str, Any], path: Path) -> None:
    """Draw one bar a kind of step, stacked by group."""
    profiles = document["profiles"]
    figure, axes = pyplot().subplots(figsize=(9, 1.2 + 0.8 * len(profiles)))
    lefts = dict.fromkeys(profiles, 0.0)
    for group, colour in zip(GROUPS, _COLOURS, strict=True):
        for mode, found in profiles.items():
            width = 1e3 * found["groups"][group]
            axes.barh(mode, width, left=lefts[mode], color=colour, edgecolor="white")
            lefts[mode] += width
        axes.barh([], [], color=colour, label=group)
    axes.invert_yaxis()
    axes.set_xlabel("ms of one step")
    axes.set_title(f"{document['profiled_at']:,} tokens, {document['card']['device']}", fontsize=9)
    axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.35), frameon=False)
    save(figure, path, dpi=150)
