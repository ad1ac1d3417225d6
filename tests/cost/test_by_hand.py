"""Times of small schedules that can be added up by hand."""

from dataclasses import replace

import pytest

from lhcp.cost.calibration import Host
from lhcp.cost.choose import predict
from lhcp.cost.clocks import Message, finish
from lhcp.cost.tables import H200
from lhcp.ring.shape import CAUSAL
from tests.cost.shapes import BASE, HAND, HAND_SHAPE, total


def test_two_equal_steps_by_hand() -> None:
    """Fails if the ring's arithmetic changes: two ranks, no mask, a message slower than a step."""
    # kv: 2 tensors x 1 token x 2 bytes = 4 bytes: 4.5 s, the step 3 s.
    assert predict("p2p", HAND_SHAPE, HAND).forward.real == pytest.approx(4.5 + 3)
    # Gradients of the other rank's token: 4 bytes, 4.5 s, posted after the second step.
    backward = predict("p2p", HAND_SHAPE, HAND).backward
    assert backward.real == pytest.approx(6 + 6 + 4.5)
    assert backward.compute == pytest.approx(12)
    # One link carries one message at a time, and its latency beside the next one's bytes.
    assert backward.communication == pytest.approx(4.5 + 4.5)


def test_compute_that_bytes_take_by_hand() -> None:
    """Fails if messages take no compute, take it from a rank that waits, or change a twin."""
    # 4 bytes go and 4 come, each in 4 s: together they take a fifth of the compute meanwhile.
    prediction = predict("p2p", HAND_SHAPE, replace(HAND, byte_compute=0.1))
    # The first step's 3 s take 3.75, and then the rank waits for its message, as it did before.
    assert prediction.forward.real == pytest.approx(4.5 + 3)
    # The first step's 6 s: 3.2 in the message's 4, 2.8 after. Nothing computes beside the last one.
    assert prediction.backward.real == pytest.approx(4 + 2.8 + 6 + 4.5)
    assert prediction.backward.compute == pytest.approx(12)
    assert prediction.backward.communication == pytest.approx(4.5 + 4.5)
    # A gather's bytes come and go as well. Beside it the diagonal, here 6 s; then the other's keys.
    long = replace(HAND, byte_compute=0.1, square=((1, 6.0, 12.0),))
    gathered = predict("allgather", replace(HAND_SHAPE, mask=CAUSAL), long)
    assert gathered.forward.real == pytest.approx(4 + 2.8 + 3)


def test_compute_beside_messages() -> None:
    """Fails if a message's share is taken when it is not under way, not added, or not bounded."""
    assert finish(1.0, 3.0, [Message(0.0, 1.0, 0.5), Message(4.0, 9.0, 0.5)]) == 4.0
    assert finish(0.0, 3.0, [Message(1.0, 3.0, 0.5)]) == pytest.approx(1 + 2 + 1)
    assert finish(2.0, 0.25, [Message(1.0, 3.0, 0.5)]) == pytest.approx(2.5)
    both = [Message(0.0, 2.0, 0.5), Message(1.0, 3.0, 0.25)]
    assert finish(0.0, 2.0, both) == pytest.approx(3 + (2 - 0.5 - 0.25 - 0.75))
    # Two that would take more than all leave a tenth.
    assert finish(0.0, 0.1, [Message(0.0, 9.0, 0.7), Message(0.0, 9.0, 5.0)]) == pytest.approx(1.0)


def test_the_host_by_hand() -> None:
    """Fails if launches are not waited for, are charged to graphs, or do not go on beside work."""
    host = Host(call=0.5, message=2.0)
    slow = replace(HAND, host=host)
    # The keys' message is posted at 2, there at 6.5; the own call is launched at 2.5 and runs 3.
    assert predict("p2p", HAND_SHAPE, slow).forward.real == pytest.approx(6.5 + 3)
    # Backward: keys at 6.5; calls 2.5 to 8.5 and 8.5 to 14.5; the parts' message 14.5 to 19.
    assert predict("p2p", HAND_SHAPE, slow).backward.real == pytest.approx(14.5 + 4.5)
    # A host that takes longer than all else is what is left: two calls and one batch; two and two.
    slower = replace(HAND, host=Host(call=50.0, message=20.0))
    assert predict("p2p", HAND_SHAPE, slower).forward.real == pytest.approx(20 + 2 * 50 + 3)
    assert predict("p2p", HAND_SHAPE, slower).forward.compute == pytest.approx(2 * 50 + 3)
    in_graphs = predict("p2p", HAND_SHAPE, slow.in_graphs())
    assert in_graphs.real == predict("p2p", HAND_SHAPE, HAND).real
    assert slow.in_graphs().name == "hand, graphs"


def test_nics_by_hand() -> None:
    """Fails if ranks of a node that are more than its NICs do not share them, or fewer gain."""
    assert [replace(HAND, nics=n).across(4).bandwidth for n in (1, 2, 4, 8)] == [0.25, 0.5, 1, 1]
    assert HAND.across(4) == replace(HAND, nics=2).across(None) == HAND.outer
    narrow = replace(H200, nics=2)
    for rotation in ("p2p", "allgather", "hierarchical", "hybrid", "hybrid_context_first"):
        all_of_them, two = (total(rotation, BASE, table) for table in (H200, narrow))
        assert two > all_of_them
    # Inside a node nobody asks a NIC.
    alone = replace(BASE, node_size=None)
    assert total("p2p", alone, narrow) == total("p2p", alone, H200)
