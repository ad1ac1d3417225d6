"""What "auto" takes: the model's fastest, by one table on all ranks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lhcp
from lhcp.comm.layout import make_layout
from lhcp.comm.mesh import as_ranks
from lhcp.cost import choose as choosing
from lhcp.cost.calibration import Host, Link
from lhcp.cost.choose import CANDIDATES, choose, play
from lhcp.cost.clocks import Clocks, Setting
from lhcp.cost.tables import CALIBRATIONS, CPU, H200
from lhcp.layer.choices import Choices
from lhcp.layer.plan import fastest_rotation, make_plan
from lhcp.ring.shape import AttentionShape
from lhcp.testing.inputs import qkv
from lhcp.testing.ranks import RankPool
from tests.cost.shapes import BASE, total

FAST = Link(latency=0.0, bandwidth=1e15)
# Gathers that cost a second a message, or neighbours that do.
SLOW_GATHERS = replace(CPU, name="slow gathers", inner=replace(FAST, hop=1.0))
TEDIOUS = Link(latency=1.0, bandwidth=1e15, hop=0.0)
SLOW_NEIGHBOURS = replace(CPU, name="slow neighbours", inner=TEDIOUS)
# Nothing crosses nodes in time but what shares heads: the least bytes win.
SLOW_NODES = replace(CPU, name="slow nodes", inner=FAST, outer=Link(latency=0.0, bandwidth=1e3))


def chosen(group: Any, rotation: Any, packed: bool = False) -> str:
    q, k, _, _ = qkv(64, dtype=torch.float32)
    choices = Choices(rotation=rotation)
    return make_plan(q, k, as_ranks(group), choices, tokens=64, packed=packed).rotation


def test_the_table_decides(ranks: RankPool) -> None:
    """Fails if "auto" is a fixed name, or ranks differ."""
    assert ranks.run(chosen, 4, SLOW_GATHERS) == ["p2p"] * 4
    assert len(set(ranks.run(chosen, 4, "auto"))) == 1


def test_documents_are_not_gathered_whole(ranks: RankPool) -> None:
    """Fails if "auto" takes for documents what sends and attends to keys that none reaches."""
    assert ranks.run(chosen, 4, SLOW_NEIGHBOURS) == ["allgather"] * 4
    assert ranks.run(chosen, 4, SLOW_NEIGHBOURS, True) == ["p2p"] * 4


def test_documents_over_nodes_have_the_fastest_that_follows_them(ranks: RankPool) -> None:
    """Fails if several nodes get a ring of all their ranks, where documents may be long."""
    (name,) = set(ranks.run(chosen, 4, SLOW_NODES, True, num_nodes=2))
    assert name in ("hybrid", "hybrid_context_first")


def read(group: Any, path: str) -> str:
    """Only rank 0 sees the file."""
    own = path if group.rank() == 0 else "nowhere.json"
    try:
        return lhcp.read_calibration(own, group).name
    except (OSError, ValueError) as error:
        return type(error).__name__


def test_one_rank_reads_for_all(ranks: RankPool, tmp_path: Path) -> None:
    """Fails if another rank reads its own file, or only rank 0 learns that there is none."""
    SLOW_GATHERS.save(tmp_path / "c.json")
    assert ranks.run(read, 3, str(tmp_path / "c.json")) == ["slow gathers"] * 3
    assert ranks.run(read, 3, str(tmp_path / "d.json")) == ["FileNotFoundError"] * 3


def attend(group: Any, rotation: Any) -> bool:
    """Whether a table given as `rotation` gives the result of the rotation that it chooses."""
    q, k, v, _ = (lhcp.shard(x, group) for x in qkv(64, dtype=torch.float32))
    by_table = lhcp.ring_attention(q, k, v, group=group, rotation=rotation)
    return torch.equal(by_table, lhcp.ring_attention(q, k, v, group=group, rotation="p2p"))


def test_a_table_is_given_as_the_rotation(ranks: RankPool) -> None:
    assert ranks.run(attend, 4, SLOW_GATHERS) == [True] * 4


def test_a_table_chooses_among_those_for_nodes(ranks: RankPool) -> None:
    """Fails if a mesh of two axes does not have the hybrids considered, or ranks differ."""
    (name,) = set(ranks.run(chosen, 4, SLOW_NODES, num_nodes=2))
    assert name in ("hybrid", "hybrid_context_first")
    assert ranks.run(chosen, 4, SLOW_NODES) == ["allgather"] * 4


def test_built_in_tables_by_name() -> None:
    """Fails if an unknown machine gets a table in silence."""
    assert lhcp.built_in_calibration("B200").in_graphs().host == Host()
    with pytest.raises(ValueError, match="built-in tables are H200, B200, cpu"):
        lhcp.built_in_calibration("TPU")


def test_the_reason_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """Fails if a user cannot see why, or sees it at every call."""
    shape = AttentionShape(
        seqlen=4096,
        layout=make_layout("zigzag", 4),
        num_heads=4,
        num_kv_heads=4,
        head_dim=64,
        element_bytes=4,
    )
    arguments: Any = ("zigzag", 4, tuple(shape.pack()), "cpu")
    with caplog.at_level("INFO", logger="lhcp"):
        for _ in range(3):
            fastest_rotation(*arguments, SLOW_NEIGHBOURS.text)
    (record,) = caplog.records
    assert "allgather" in record.getMessage() and "slow neighbours" in record.getMessage()


def test_choice_follows_the_machine() -> None:
    """Fails if `choose` does not take the shortest prediction, or hides the others."""
    large = replace(BASE, seqlen=2**20, layout=make_layout("zigzag", 32), node_size=8)
    for shape in (BASE, large):
        for calibration in CALIBRATIONS.values():
            rotation, reason = choose(shape, calibration)
            assert choose(shape, calibration) == (rotation, reason)
            times = {r: total(r, shape, calibration) for r in CANDIDATES}
            assert times[rotation] == min(times.values())
            assert all(r in reason for r in times) and calibration.name in reason
    assert choose(replace(BASE, node_size=None), CPU, ("alltoall",))[0] == "alltoall"


def test_choosing_plays_each_candidate_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if choosing costs more than a play a candidate and direction: ranks do it at once."""
    played = []

    def counted(rotation: str, setting: Setting, **options: bool) -> Clocks:
        played.append((rotation, setting.direction, options))
        return play(rotation, setting, **options)

    monkeypatch.setattr(choosing, "play", counted)
    choose(BASE, H200)
    assert played == [(name, d, {}) for name in CANDIDATES for d in ("forward", "backward")]
