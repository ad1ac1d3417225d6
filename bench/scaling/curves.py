"""Curves of the cost model: one layer's time, overhead and memory on the ranks of 32 GPUs."""

from typing import Any

from bench.common.figures import pyplot, save
from bench.common.page import text_table
from lhcp.comm.layout import make_layout
from lhcp.config import LighthouseConfig
from lhcp.cost.calibration import Calibration
from lhcp.cost.choose import choose, predict
from lhcp.cost.traffic import boundary_bytes, rotation_memory
from lhcp.ring.shape import AttentionShape

Row = dict[str, Any]

# The paper's decoder: 8 heads of 128; strata for zigzag on up to 32 ranks.
CONFIG = LighthouseConfig(num_levels=4, pool_factor=4, topk=4096, num_strata=64)
HEADS, HEAD_DIM = 8, 128
CP_SIZES = ((8, None), (32, 8))  # (ranks of one sequence, ranks of a node where there are several)


def layer(
    seqlen: int, world_size: int, node_size: int | None, mode: str, calibration: Calibration
) -> Row:
    """Predict one layer's forward + backward on one rank.

    Args:
        seqlen: N. mode: "dense" or "lighthouse".
    """
    entries = seqlen if mode == "dense" else CONFIG.subsequence_length(seqlen)
    shape = AttentionShape(
        seqlen=entries,
        layout=make_layout("zigzag", world_size),
        num_heads=HEADS,
        num_kv_heads=HEADS,
        head_dim=HEAD_DIM,
        node_size=node_size,
    )
    rotation, reason = choose(shape, calibration)
    prediction = predict(rotation, shape, calibration)
    row = HEADS * HEAD_DIM * shape.element_bytes
    local, sub = seqlen // world_size, entries // world_size
    seconds = prediction.real
    # q, k, v in and out; saved for the backward: q, k, v, out of the attention, and its lse.
    memory = 8 * local * row + 4 * sub * row + 4 * sub * HEADS
    if mode == "lighthouse":
        # Both directions move each of q, k, v, o once over the tokens and once over the entries.
        seconds += 2 * calibration.copy_seconds(4 * (local + sub) * row)
        link = calibration.inner if node_size is None else calibration.outer
        seconds += 2 * (link.latency + boundary_bytes(shape, CONFIG.num_levels) / link.bandwidth)
        pyramid = local * 4 // 3
        memory += 3 * (pyramid - local) * row + 4 * HEADS * (sub + pyramid)
    memory += rotation_memory(rotation, shape)
    sent = prediction.forward.traffic.num_bytes + prediction.backward.traffic.num_bytes
    return {
        "mode": mode,
        "cp": world_size,
        "seqlen": seqlen,
        "subsequence": entries,
        "rotation": rotation,
        "ms": 1e3 * seconds,
        "attention_ms": 1e3 * prediction.real,
        "compute_ms": 1e3 * (prediction.forward.compute + prediction.backward.compute),
        "exposed_ms": 1e3 * (prediction.forward.exposed + prediction.backward.exposed),
        "overhead": prediction.overhead,
        "mb_per_rank": sent / 1e6,
        "memory_gib": memory / 2**30,
        "reason": reason,
    }


def curves(calibration: Calibration) -> list[Row]:
    """Predict all lengths that the config fits, up to 1M tokens."""
    lengths = [2**i for i in range(18, 21)]
    lengths = [n // 2 * 3 // 2 for n in lengths[1:]] + lengths
    return [
        layer(n, cp, node, mode, calibration)
        for mode in ("dense", "lighthouse")
        for cp, node in CP_SIZES
        for n in sorted(lengths)
    ]


def print_curves(rows: list[Row], calibration: Calibration) -> None:
    """Print a row a mode, cp size and length."""
    print(f"{calibration.name}: {calibration.source}")
    header = ("mode", "rotation", "cp", "N", "S", "ms f+b", "exposed ms", "overhead", "MB sent")
    cells = [
        (
            *(r["mode"], r["rotation"], r["cp"], f"{r['seqlen']:,}", f"{r['subsequence']:,}"),
            *(f"{r['ms']:.2f}", f"{r['exposed_ms']:.2f}", f"{100 * r['overhead']:.1f}%"),
            *(f"{r['mb_per_rank']:.0f}", f"{r['memory_gib']:.2f}"),
        )
        for r in rows
    ]
    print(text_table((*header, "GiB/rank"), cells))


def draw(rows: list[Row], calibration: Calibration, path: str) -> None:
    """Draw time, overhead and memory against N: a line a mode and cp size."""
    figure, panels = pyplot().subplots(1, 3, figsize=(13, 4))
    titles = (
        ("ms", "one layer, forward + backward, ms a rank", 1.0),
        ("overhead", "rotation over one device / W, %", 100.0),
        ("memory_gib", "memory of one layer and its rotation, GiB a rank", 1.0),
    )
    styles = {("dense", 8): "C3-o", ("dense", 32): "C3--s"}
    styles |= {("lighthouse", 8): "C0-o", ("lighthouse", 32): "C0--s"}
    for panel, (key, title, factor) in zip(panels, titles, strict=True):
        for (mode, cp), style in styles.items():
            line = [r for r in rows if (r["mode"], r["cp"]) == (mode, cp)]
            label = f"{mode}, " + ("dp 4 x cp 8" if cp == 8 else "cp 32, 4 nodes")
            xs, ys = [r["seqlen"] for r in line], [factor * r[key] for r in line]
            panel.plot(xs, ys, style, label=label, markersize=4)
        panel.set_xscale("log", base=2)
        panel.set_xticks(xs, [f"{x // 1024}K" for x in xs], fontsize=8)
        panel.set_xlabel("tokens of one sequence")
        panel.set_title(title, fontsize=9)
        panel.grid(alpha=0.3)
        if key != "overhead":
            panel.set_yscale("log")
    panels[0].legend(fontsize=8)
    figure.suptitle(f"Predicted, 32 {calibration.name}s; L=4, p=4, k=4096", fontsize=10)
    figure.tight_layout()
    save(figure, path)
    print(f"curves: {path}")
