"""Curves of the cost model: one layer's time on 8 to 64 ranks, with what binds, up to 4M tokens."""

from collections.abc import Sequence

from bench.common.figures import pyplot, save
from bench.common.page import Page
from bench.scaling.layer import CONFIG, MODES, Question, Row, layer
from lhcp.cost.calibration import Calibration

CP_SIZES = (8, 16, 32, 64)
SEQLENS = tuple(2**i for i in range(18, 23))


def curves(calibration: Calibration, seqlens: Sequence[int] = SEQLENS) -> list[Row]:
    """Predict both modes at all lengths, on all numbers of ranks."""
    return [
        layer(Question(mode, n, cp, calibration))
        for mode in MODES
        for cp in CP_SIZES
        for n in seqlens
    ]


def tokens(n: int) -> str:
    """Return a length in words: 256K, 4M."""
    return f"{n // 2**10}K" if n < 2**20 else f"{n // 2**20}M"


def show(page: Page, rows: Sequence[Row], calibration: Calibration) -> None:
    """Show a row a mode, cp size and length."""
    page.table(
        f"{calibration.name}: one layer, forward + backward",
        calibration.source + ".",
        (
            *("mode", "cp", "N", "S", "rotation", "layer, ms", "attention, ms", "exposed, ms"),
            *("over one / W", "binds", "MB across", "MB inside", "GiB a rank"),
        ),
    )
    for r in rows:
        page.row(
            *(r["mode"], r["cp"], tokens(r["seqlen"]), f"{r['subsequence']:,}", r["rotation"]),
            *(f"{r[key]:.2f}" for key in ("ms", "attention_ms", "exposed_ms")),
            *(f"{100 * r['overhead']:+.0f}%", r["binds"], f"{r['across_mb']:.0f}"),
            *(f"{r['inside_mb']:.0f}", f"{r['memory_gib']:.2f}"),
        )


def draw(by_machine: dict[str, list[Row]], path: str) -> None:
    """Draw a layer's time against N: a row of panels a machine, a line a cp size."""
    size = (12, 4.5 * len(by_machine))
    figure, grid = pyplot().subplots(len(by_machine), 2, figsize=size, squeeze=False)
    for panels, (machine, rows) in zip(grid, by_machine.items(), strict=True):
        for panel, mode in zip(panels, MODES, strict=True):
            for i, cp in enumerate(CP_SIZES):
                line = [r for r in rows if (r["mode"], r["cp"]) == (mode, cp)]
                xs, ys = [r["seqlen"] for r in line], [r["ms"] for r in line]
                nodes = "a node" if cp == CP_SIZES[0] else f"{cp // CP_SIZES[0]} nodes"
                panel.plot(xs, ys, f"C{i}-o", label=f"cp {cp}, {nodes}", markersize=4)
                for r in line:
                    place = {"xytext": (4, -9 if i % 2 else 4), "textcoords": "offset points"}
                    words = r["binds"] if r["binds"] != "attention" else ""
                    at = (r["seqlen"], r["ms"])
                    panel.annotate(words, at, fontsize=6, color=f"C{i}", **place)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(xs, [tokens(x) for x in xs], fontsize=8)
            panel.set_xlabel("tokens of one sequence")
            panel.set_title(f"{machine}, {mode}: ms a layer, forward + backward", fontsize=9)
            panel.grid(alpha=0.3)
        panels[0].legend(fontsize=8)
    k = f"L={CONFIG.num_levels}, p={CONFIG.pool_factor}, k={CONFIG.topk}"
    what = "at each point what binds; nothing: the attention itself"
    figure.suptitle(f"Predicted; {k}; {what}", fontsize=10)
    figure.tight_layout()
    save(figure, path)
    print(f"curves: {path}")
