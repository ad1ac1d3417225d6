"""Shapes that the cost model's tests ask about, and a machine whose times are added up by hand."""

from lhcp.comm.layout import Layout
from lhcp.cost.calibration import Calibration, Link
from lhcp.cost.choose import predict
from lhcp.cost.tables import H200
from lhcp.ring.shape import FULL, AttentionShape

ZIGZAG = Layout("zigzag", 8)
BASE = AttentionShape(
    seqlen=65_536, layout=ZIGZAG, num_heads=8, num_kv_heads=8, head_dim=128, node_size=4
)

HAND_LINK = Link(latency=0.5, bandwidth=1.0)
HAND = Calibration(
    name="hand",
    source="these tests",
    num_heads=1,
    head_dim=1,
    square=((1, 1.0, 2.0),),
    full=((1, 1, 3.0, 6.0),),
    copy_bandwidth=1e18,
    merge_bandwidth=1e18,
    launch=0.0,
    inner=HAND_LINK,
    outer=HAND_LINK,
)
HAND_SHAPE = AttentionShape(
    seqlen=2,
    layout=Layout("contiguous", 2),
    num_heads=1,
    num_kv_heads=1,
    head_dim=1,
    element_bytes=2,
    mask=FULL,
)


def total(rotation: str, shape: AttentionShape, calibration: Calibration = H200) -> float:
    return predict(rotation, shape, calibration).real
