"""One layer of the paper's decoder by the cost model: time, overhead, memory, and what binds."""

from dataclasses import dataclass, replace
from typing import Any

from lhcp.comm.layout import make_layout
from lhcp.config import LighthouseConfig
from lhcp.cost.calibration import Calibration, Link
from lhcp.cost.choose import DIRECTIONS, choose, play, predict
from lhcp.cost.clocks import Setting
from lhcp.cost.traffic import boundary_bytes, rotation_memory
from lhcp.ring.shape import AttentionShape

Row = dict[str, Any]

# The paper's decoder: 8 heads of 128; strata for zigzag on up to 64 ranks.
CONFIG = LighthouseConfig(num_levels=4, pool_factor=4, topk=4096, num_strata=128)
HEADS, HEAD_DIM, LAYERS = 8, 128, 30
NODE = 8
"""GPUs of a node."""
MODES = ("lighthouse", "dense")
STAGE_RATE, STAGES = 0.93, 63e-6
"""What a layer's six local kernels move their bytes at, of a copy's rate, and the seconds that they
take beside, forward and backward: fitted to their times on an H200 for 32K to 256K tokens, which it
meets within 2% (bench/results/latency_h200_2026-11-24_fa4.md); a B200 is given the same. Bytes in
rows of q: the pool reads three a token and writes one, the scatter and the two backward kernels
move five more; the four that know entries move eleven an entry."""
BINDS = 0.05
"""What would save less than this share of an attention's time does not bind it."""


@dataclass(frozen=True)
class Question:
    """One layer on the ranks of one sequence."""

    mode: str
    """"lighthouse" or "dense"."""
    seqlen: int
    """N."""
    cp: int
    """Ranks of one sequence; those of a node first."""
    calibration: Calibration
    config: LighthouseConfig = CONFIG
    heads: int = HEADS
    head_dim: int = HEAD_DIM
    node: int = NODE

    @property
    def entries(self) -> int:
        """S, what is attended to."""
        dense = self.mode == "dense"
        return self.seqlen if dense else self.config.subsequence_length(self.seqlen)

    @property
    def shape(self) -> AttentionShape:
        """The attention."""
        return AttentionShape(
            seqlen=self.entries,
            layout=make_layout("zigzag", self.cp),
            num_heads=self.heads,
            num_kv_heads=self.heads,
            head_dim=self.head_dim,
            node_size=self.node if self.cp > self.node else None,
        )


def layer(asked: Question, rotation: str | None = None) -> Row:
    """Predict one layer's forward + backward on one rank, by a rotation or by the fastest."""
    shape, calibration = asked.shape, asked.calibration
    rotation, reason = (rotation, "as asked") if rotation else choose(shape, calibration)
    prediction = predict(rotation, shape, calibration)
    forward, backward = prediction.forward, prediction.backward
    row = asked.heads * asked.head_dim * shape.element_bytes
    local, sub = asked.seqlen // asked.cp, shape.tokens
    seconds = prediction.real
    # q, k, v in and out; saved for the backward: q, k, v, out of the attention, and its lse.
    memory = 8 * local * row + 4 * sub * row + 4 * sub * asked.heads
    if asked.mode == "lighthouse":
        moved = (9 * local + 11 * sub) * row
        seconds += STAGES + moved / (STAGE_RATE * calibration.copy_bandwidth)
        if asked.cp > 1:
            link = calibration.inner if shape.node_size is None else calibration.outer
            owed = boundary_bytes(shape, asked.config.num_levels) / link.bandwidth
            seconds += 2 * (calibration.host.message + link.latency + owed)
        pyramid = local * 4 // 3
        memory += 3 * (pyramid - local) * row + 4 * asked.heads * (sub + pyramid)
    memory += rotation_memory(rotation, shape)
    sent = [phase.traffic for phase in (forward, backward)]
    return {
        "machine": calibration.name,
        "mode": asked.mode,
        "cp": asked.cp,
        "seqlen": asked.seqlen,
        "subsequence": asked.entries,
        "rotation": rotation if asked.cp > 1 else "-",
        "ms": 1e3 * seconds,
        "attention_ms": 1e3 * prediction.real,
        "compute_ms": 1e3 * (forward.compute + backward.compute),
        "exposed_ms": 1e3 * (forward.exposed + backward.exposed),
        "overhead": prediction.overhead,
        "binds": binds(rotation, shape, calibration),
        "across_mb": sum(one.across_bytes for one in sent) / 1e6,
        "inside_mb": sum(one.num_bytes - one.across_bytes for one in sent) / 1e6,
        "memory_gib": memory / 2**30,
        "reason": reason,
    }


def binds(rotation: str, shape: AttentionShape, calibration: Calibration) -> str:
    """Name what, were it free, would shorten an attention most: by playing it without.

    Returns:
        "NIC" or "NVLink" (their bytes), "latency", "host"; "blocks" (their shortness: compute
        above one device's over W); or "attention", where none of these is a twentieth of its time.
    """

    def seconds(table: Calibration) -> float:
        return sum(play(rotation, Setting(shape, table, d)).seconds for d in DIRECTIONS)

    def without(link: Link) -> Link:
        return replace(link, latency=0.0, hop=0.0)

    real, prediction = seconds(calibration), predict(rotation, shape, calibration)
    inner, outer = calibration.inner, calibration.outer
    tables = {
        "NIC": replace(calibration, outer=replace(outer, bandwidth=1e30)),
        "NVLink": replace(calibration, inner=replace(inner, bandwidth=1e30)),
        "latency": replace(calibration, inner=without(inner), outer=without(outer)),
        "host": calibration.in_graphs(),
    }
    saved = {name: real - seconds(table) for name, table in tables.items()}
    in_graphs = predict(rotation, shape, calibration.in_graphs())
    compute = in_graphs.forward.compute + in_graphs.backward.compute
    saved["blocks"] = compute - prediction.single / shape.world_size
    most = max(saved, key=lambda name: saved[name])
    return most if saved[most] > BINDS * real else "attention"
