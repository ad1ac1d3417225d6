"""The model played with compute as it was measured."""

from dataclasses import replace

import pytest

from bench.scaling.measured import with_compute
from lhcp.comm.layout import make_layout
from lhcp.cost.choose import predict
from lhcp.cost.tables import CPU
from lhcp.ring.shape import AttentionShape


@pytest.mark.parametrize("rotation", ["p2p", "hierarchical", "hybrid", "hybrid_context_first"])
def test_compute_is_what_was_measured(rotation: str) -> None:
    """Fails if messages are played otherwise too, or longer compute does not hide more of them."""
    shape = AttentionShape(
        seqlen=2**14,
        layout=make_layout("zigzag", 4),
        num_heads=4,
        num_kv_heads=4,
        head_dim=64,
        element_bytes=4,
        node_size=2,
    )
    # Else most of what is exposed is compute that bytes take.
    table = replace(CPU, byte_compute=0.0)
    before = predict(rotation, shape, table).forward
    exposed = []
    for factor in (0.05, 1.0, 2.0):
        after = with_compute(rotation, shape, table, "forward", factor * before.compute)
        assert after.compute == pytest.approx(factor * before.compute, rel=1e-4)
        assert after.communication == pytest.approx(before.communication)
        exposed.append(after.exposed)
    assert exposed[1] == pytest.approx(before.exposed)
    # Exchanges of heads hide behind nothing; what is left of the ring does.
    if rotation == "hybrid_context_first":
        assert exposed == pytest.approx([exposed[1]] * 3)
    else:
        assert exposed[0] > 5 * exposed[1] and exposed[1] == pytest.approx(exposed[2])
