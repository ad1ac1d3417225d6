"""What bench/train_step.py prints and writes: lines, a dated markdown page, JSON, two pictures."""

import json
from pathlib import Path
from typing import Any

from train_step_model import GROUPS, Point, Row, crossover, paper_hours

_HEADS = (
    ("N", 9),
    ("kept", 10),
    ("k", 5),
    ("S", 7),
    ("dense s", 18),
    ("lighthouse s", 18),
    ("tokens/s dense", 14),
    ("lighthouse", 10),
    ("GiB dense", 9),
    ("lighthouse", 10),
    ("speed-up", 8),
    ("limit", 6),
)
_COLOURS = ("#44aa99", "#4477aa", "#ddaa33", "#cc6677", "#882255", "#999999", "#dddddd")


def cells(row: Row) -> list[str]:
    """One row of the table as text."""
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


def line(row: Row | None) -> str:
    """One line of the printed table; without a row, its head."""
    texts = [head for head, _ in _HEADS] if row is None else cells(row)
    return "  ".join(text.rjust(width) for text, (_, width) in zip(texts, _HEADS, strict=True))


def points(rows: list[Row], *, checkpointed: bool | None = None) -> list[Point]:
    """Rows with both times; of each length the one without checkpointing, unless one is named."""
    chosen: dict[int, Point] = {}
    for row in sorted(rows, key=lambda one: one["checkpointed"]):
        if "speedup" in row and checkpointed in (None, row["checkpointed"]):
            point = Point(row["seqlen"], row["dense"]["seconds"], row["lighthouse"]["seconds"])
            chosen.setdefault(row["seqlen"], point)
    return sorted(chosen.values(), key=lambda point: point.seqlen)


def results(rows: list[Row]) -> dict[str, Any]:
    """What follows from the table by arithmetic."""
    hours = {point.seqlen: paper_hours(point) for point in points(rows)}
    return {"crossover": crossover(points(rows, checkpointed=False)), "gpu_hours": hours}


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def page(document: dict[str, Any], stem: str) -> str:
    """The whole result as markdown."""
    card, rows = document["card"], document["rows"]
    parts = [
        f"# One training step, {card['device']}, {card['backend']}, {document['date']}",
        f"`{card['command']}`",
        table(["", ""], [[name, str(value)] for name, value in card.items()]),
        "Batch 1. kept: what the backward finds, all activations or only each block's input. In "
        "parentheses: extrapolated with a + bN + cN^2 through the dense lengths that were run. "
        "±: half the spread over the median. *: the host, not the GPU, sets the pace. limit: the "
        "dense step with each lighthouse layer's attention replaced by the kernel on S tokens and "
        "the bytes that must move. From a million tokens on no layer is dense, L=4.",
        table([head for head, _ in _HEADS], [cells(row) for row in rows]),
        f"Gate: errors against fp32, compiled and eager: `{json.dumps(document['gate'])}`",
    ]
    cross = document.get("crossover")
    where = f"at {cross:,.0f} tokens" if cross else "not between the measured lengths"
    parts += [
        f"Crossover: {where}.",
        "## The paper's 10k + 6k steps against 16k dense ones, by arithmetic",
        "GPU hours at the paper's 3.1M tokens a step, from the times of one sequence.",
        table(
            ["N", "10k lighthouse + 6k dense", "16k dense", "ratio"],
            [
                [f"{int(n):,}", f"{two:,.0f}", f"{dense:,.0f}", f"{dense / two:.2f}x"]
                for n, (two, dense) in document.get("gpu_hours", {}).items()
            ],
        ),
    ]
    if document["profiles"]:
        parts += _profile_parts(document, stem)
    if len(document.get("gpu_hours", {})) > 1:
        parts.append(f"![speed-up against length]({stem}_speedup.png)")
    return "\n\n".join(parts) + "\n"


def _profile_parts(document: dict[str, Any], stem: str) -> list[str]:
    profiles = document["profiles"]
    parts = [
        f"## Where a step's time goes, {document['profiled_at']:,} tokens, ms",
        table(
            ["", *profiles],
            [
                [group, *(f"{1e3 * found['groups'][group]:.1f}" for found in profiles.values())]
                for group in GROUPS
            ],
        ),
        f"![one step's time]({stem}_profile.png)",
    ]
    for mode, found in profiles.items():
        longest = [
            [f"`{name[:90]}`", f"{1e3 * seconds:.2f}", str(calls)]
            for name, seconds, calls in found["kernels"][:20]
        ]
        parts += [f"Longest kernels, {mode}:", table(["kernel", "ms", "calls"], longest)]
    return parts


def write(document: dict[str, Any], folder: Path) -> None:
    """Write page, JSON and pictures; called after each length, so that nothing is lost."""
    folder.mkdir(parents=True, exist_ok=True)
    card = document["card"]
    device = card["device"].split()[-1].lower()
    stem = f"train_step_{device}_{document['date']}_{card['backend']}"
    (folder / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n")
    (folder / f"{stem}.md").write_text(page(document, stem))
    if len(points(document["rows"])) > 1:
        draw_speedup(document, folder / f"{stem}_speedup.png")
    if document["profiles"]:
        draw_profile(document, folder / f"{stem}_profile.png")


def draw_speedup(document: dict[str, Any], path: Path) -> None:
    """Draw speed-up against length, measured and at the limit."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
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
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def draw_profile(document: dict[str, Any], path: Path) -> None:
    """Draw one bar a kind of step, stacked by group."""
    pyplot = _pyplot()
    profiles = document["profiles"]
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.8 * len(profiles)))
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
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
