"""The physical limit of an attention across ranks: bytes over NICs and NVLink, and the products."""

from collections.abc import Sequence

from bench.common.page import Page
from bench.scaling.curves import tokens
from bench.scaling.layer import Question, Row
from lhcp.cost.calibration import Calibration
from lhcp.cost.choose import CANDIDATES, DIRECTIONS
from lhcp.cost.clocks import single_seconds
from lhcp.cost.traffic import traffic
from lhcp.ring.heads import fits

PHASES = ("NIC", "NVLink", "products")


def limit(rotation: str, asked: Question) -> Row:
    """Count what the busiest rank sends of one attention, and how long that takes at least.

    What comes goes at once with it, and is taken to be no more. The products are one device's over
    W: half of a square, forward and backward.
    """
    shape, calibration = asked.shape, asked.calibration
    found: Row = {"mode": asked.mode, "seqlen": asked.seqlen, "cp": asked.cp, "rotation": rotation}
    rates = (calibration.across(shape.node_size).bandwidth, calibration.inner.bandwidth)
    for direction in DIRECTIONS:
        sent = [traffic(rotation, shape, direction, rank) for rank in range(shape.world_size)]
        most = (
            max(one.across_bytes for one in sent),
            max(one.num_bytes - one.across_bytes for one in sent),
        )
        ms = [1e3 * num_bytes / rate for num_bytes, rate in zip(most, rates, strict=True)]
        ms.append(1e3 * single_seconds(shape, calibration, direction) / shape.world_size)
        found[direction] = {"bytes": most, "ms": dict(zip(PHASES, ms, strict=True))}
    both = [found[direction]["ms"].values() for direction in DIRECTIONS]
    found["hidden_ms"], found["in_turn_ms"] = sum(map(max, both)), sum(map(sum, both))
    return found


def show_limits(page: Page, calibration: Calibration, asked: Sequence[Question]) -> list[Row]:
    """Show a row a question and rotation that fits it."""
    rows = [limit(r, one) for one in asked for r in CANDIDATES if fits(r, one.shape)]
    outer, inner = calibration.outer.bandwidth / 1e9, calibration.inner.bandwidth / 1e9
    page.table(
        f"{calibration.name}: the physical limit of the attention",
        f"The rank that sends most, {calibration.nics or 'as many'} NICs a node of {outer:.0f} "
        f"GB/s each, NVLink {inner:.0f} GB/s, a direction. Milliseconds, forward / backward; the "
        "limit is where each direction takes as long as the longest of the three, and in turn "
        "where nothing hides.",
        (
            *("mode", "N", "cp", "rotation", "MB over a NIC", "MB over NVLink"),
            *("NIC", "NVLink", "products", "limit", "in turn"),
        ),
    )
    for row in rows:
        pair = [row[direction] for direction in DIRECTIONS]
        mb = [" / ".join(f"{one['bytes'][i] / 1e6:.1f}" for one in pair) for i in range(2)]
        ms = [" / ".join(f"{one['ms'][name]:.3f}" for one in pair) for name in PHASES]
        name = (row["mode"], tokens(row["seqlen"]), row["cp"], row["rotation"])
        page.row(*name, *mb, *ms, f"{row['hidden_ms']:.2f}", f"{row['in_turn_ms']:.2f}")
    return rows
