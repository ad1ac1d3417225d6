"""The page of a recovery: tables as markdown, and its numbers as JSON."""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lhcp.page import write_page
from lhcp.training.recovery_pictures import Against, draw
from lhcp.training.recovery_report import (
    SLOW,
    Comparison,
    Spread,
    bands,
    by_arm,
    compare,
    curve,
    spread,
    training_seconds,
)
from lhcp.training.recovery_results import ArmResult
from lhcp.training.selection_picture import draw_selections

Rows = Iterable[Sequence[object]]


def number(value: float | None, sign: str = "", digits: int = 3, without: str = "-") -> str:
    """Return a number as the page shows it; `without` where there is none."""
    return without if value is None else f"{value:{sign}.{digits}f}"


def over_seeds(found: Spread | None, sign: str = "", digits: int = 3) -> str:
    """Return "mean (lowest to highest; std, seeds)"."""
    if found is None:
        return "-"
    low, high = (number(x, sign, digits) for x in (found.low, found.high))
    std = "" if found.std is None else f"; std {found.std:.{digits}f}"
    return f"{number(found.mean, sign, digits)} ({low} to {high}{std}; n={found.count})"


def table(title: str, note: str, header: Sequence[str], rows: Rows) -> list[str]:
    """Return the lines of a section with a table."""
    cells = [header, ["---"] * len(header), *rows]
    return ["", f"## {title}", note, "", *("| " + " | ".join(map(str, r)) + " |" for r in cells)]


def facts(results: Sequence[ArmResult]) -> list[str]:
    """Return the lines about where the numbers come from."""
    run = results[0].run
    seeds = sorted({r.seed for r in results})
    texts = {r.identity["data.files"][:12] for r in results}
    lines = [
        f"- seeds: {', '.join(map(str, seeds))}; tokens a step: "
        f"{run['global_batch'] * run['seqlen']:,} ({run['global_batch']} x {run['seqlen']:,})",
        f"- model: {run['model']}",
        f"- lighthouse: {run['lighthouse']}",
        f"- optim: {run['optim']}; dtype {results[0].identity['dtype']}",
        f"- text (digest): {', '.join(sorted(texts))}"
        + ("; **seeds read different texts**" if len(texts) > 1 else ""),
    ]
    short = run.get("short", {})
    if short.get("steps"):
        lines.append(
            f"- begun from a short stage: {short['steps']:,} dense steps of "
            f"{short['global_batch']} x {short['seqlen']:,} tokens, rate {short['lr']:g}; its time "
            "counts for nobody"
        )
    for name in results[0].about:
        said = list(dict.fromkeys(str(r.about.get(name)) for r in results))
        lines.append(f"- {name}: " + "; ".join(said))
    cards = {(r.seed, r.about["card"], r.about["world_size"]) for r in results}
    if len(cards) > len(seeds):
        lines.append("- **arms of one seed ran on different cards: its times do not compare**")
    accepted = [f"seed {r.seed}, {r.arm}: {c}" for r in results for c in r.changes]
    return lines + [f"- accepted on the way: {line}" for line in accepted]


def markdown(results: Sequence[ArmResult], pictures: Sequence[str]) -> str:
    """Return the page."""
    found = compare(results)
    lines = [f"# Recovery: {results[0].recipe}, {time.strftime('%F')}", "", *facts(results)]
    lines += [
        "",
        "Losses are nats per byte of held-out text, attending densely where nothing else is said. "
        "Seconds are sums of training steps, without evaluations and checkpoints, a split's with "
        f"its lighthouse steps; a step of more than {SLOW:g} medians of its stage (compiling) "
        "counts as the median. Over seeds: mean (lowest to highest; std, n seeds). A seed draws "
        "its own held-out sequences too, the same in all of its arms.",
        "",
        *(f"![loss]({name})" for name in pictures),
    ]
    finals = {
        arm: [(r.seed, curve(r, "dense").losses[-1], training_seconds(r)[-1]) for r in same]
        for arm, same in by_arm(results).items()
    }
    lines += table(
        "Final loss",
        "Each after all of its own steps; `lighthouse` is the stage alone, evaluated densely.",
        ["run", "by seed", "over seeds", "seconds"],
        [
            (
                arm,
                ", ".join(f"{seed}: {loss:.3f}" for seed, loss, _ in rows),
                over_seeds(spread([loss for _, loss, _ in rows])),
                over_seeds(spread([s for *_, s in rows]), digits=1),
            )
            for arm, rows in finals.items()
        ],
    )
    lines += table(
        "At the switch",
        "The same weights and text in both modes; steps until the dense loss was back below the "
        "lighthouse one, as far as evaluations tell.",
        ["split", "seed", "lighthouse mode", "dense mode", "jump", "back after dense steps"],
        [
            (
                *(c.split, c.seed, number(c.switch.lighthouse), number(c.switch.dense)),
                number(c.switch.jump, "+"),
                "not reached" if c.switch.recovered_at is None else c.switch.recovered_at,
            )
            for c in found
        ],
    )
    lines += against_dense(found)
    shown = bands(results)
    columns = [(arm, mode) for arm in shown for mode in shown[arm]]
    steps = sorted({step for modes in shown.values() for b in modes.values() for step in b.steps})
    lines += table(
        "Held-out loss by step",
        "Mean over seeds.",
        ["step", *(f"{arm}, {mode}" for arm, mode in columns)],
        [
            (
                f"{step:.0f}",
                *(
                    number(dict(zip(b.steps, b.mean, strict=True)).get(step), without="")
                    for b in (shown[arm][mode] for arm, mode in columns)
                ),
            )
            for step in steps
        ],
    )
    return "\n".join(lines) + "\n"


def against_dense(found: Sequence[Comparison]) -> list[str]:
    """Return the tables of splits against dense: by seed, and over seeds."""
    never, ended = "not reached", "dense ended before"
    lines = table(
        "Against dense, by seed",
        "Below 0 the split is better. Dense at equal time is in line between its evaluations.",
        [
            *("split", "seed", "final", "dense at equal tokens", "difference"),
            *("dense at equal time", "difference", "seconds, split / dense, with slow steps"),
            *("seconds to dense's final loss, split / dense", "share"),
        ],
        [
            (
                *(c.split, c.seed, number(c.switch.final)),
                *(number(c.dense_at_tokens), number(c.equal_tokens, "+")),
                *(number(c.dense_at_time, without=ended), number(c.equal_time, "+")),
                f"{c.seconds:.1f} / {c.dense_seconds:.1f}, {c.whole_seconds:.1f}",
                f"{number(c.reached, digits=1, without=never)} / {c.dense_reached:.1f}",
                number(c.time_share, digits=2),
            )
            for c in found
        ],
    )
    splits = {c.split: [d for d in found if d.split == c.split] for c in found}
    return lines + table(
        "Against dense, over seeds",
        "Differences and shares are taken by seed, and then over the seeds that have them.",
        [
            *("split", "difference at equal tokens", "difference at equal time"),
            *("time over dense's", "time to dense's final loss over dense's", "jump"),
        ],
        [
            (
                split,
                over_seeds(spread([c.equal_tokens for c in same]), "+"),
                over_seeds(spread([c.equal_time for c in same if c.equal_time is not None]), "+"),
                over_seeds(spread([c.seconds / c.dense_seconds for c in same]), digits=2),
                over_seeds(spread([c.time_share for c in same if c.time_share is not None]), "", 2),
                over_seeds(spread([c.switch.jump for c in same]), "+"),
            )
            for split, same in splits.items()
        ],
    )


def cards(results: Sequence[ArmResult]) -> list[str]:
    """Return the cards that results came from, as names of files have them: "h200x2", "cpu"."""
    found = set()
    for about in (result.about for result in results):
        # "NVIDIA H200", "NVIDIA H100 80GB HBM3"; a processor has no cuDNN.
        card = about["card"].removeprefix("NVIDIA ").split()[0].lower()
        many = f"x{about['world_size']}" if about["world_size"] > 1 else ""
        found.add(("cpu" if "cudnn" not in about else card) + many)
    return sorted(found)


def document(results: Sequence[ArmResult]) -> dict[str, Any]:
    """Return the page's numbers, JSON-ready; steps one by one stay in the results files."""
    return {
        "recipe": results[0].recipe,
        "date": time.strftime("%F"),
        "comparisons": [
            asdict(c)
            | {
                "jump": c.switch.jump,
                "equal_tokens": c.equal_tokens,
                "equal_time": c.equal_time,
                "time_share": c.time_share,
            }
            for c in compare(results)
        ],
        "bands": {p: {m: asdict(b) for m, b in x.items()} for p, x in bands(results).items()},
        "results": [
            {k: v for k, v in asdict(result).items() if k not in ("columns", "identity")}
            | {"seconds": training_seconds(result)[-1]}
            for result in results
        ],
    }


def write(results: Sequence[ArmResult], folder: Path) -> Path:
    """Write the page, its JSON and its pictures into `folder`; return the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{results[0].recipe}_{'_'.join(cards(results))}_{time.strftime('%F')}"
    pictures: dict[str, Against] = {f"{stem}_steps.png": "steps", f"{stem}_seconds.png": "seconds"}
    for name, against in pictures.items():
        draw(results, folder / name, against)
    names = list(pictures)
    if seen := [result for result in results if result.selections]:
        # A split has its lighthouse stage's records too.
        names.append(f"{stem}_selection.png")
        draw_selections(max(seen, key=lambda r: len(r.selections)).selections, folder / names[-1])
    (folder / f"{stem}.json").write_text(json.dumps(document(results)) + "\n")
    page = folder / f"{stem}.md"
    write_page(page, markdown(results, names))
    return page
