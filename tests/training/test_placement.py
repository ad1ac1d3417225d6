"""Where ranks are: nodes as they were started or as they are named, and what layers are told."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lhcp.cost.tables import CPU
from lhcp.training.placement import chosen_rotation, make_mesh, num_nodes, place
from lhcp.training.run import Run
from lhcp.training.run_checks import check_run


def test_nodes_are_as_started_or_as_named(small_run: Run) -> None:
    """Fails if a sequence inside a node is taken to cross, or one across nodes not to."""

    def nodes(cp: int, started_together: int, **more: Any) -> int:
        return num_nodes(replace(small_run, cp=cp, **more), started_together)

    assert [nodes(cp, 8) for cp in (1, 4, 8, 16, 32)] == [1, 1, 1, 2, 4]
    # Ranks that do not fill whole nodes count as if links were alike.
    assert nodes(12, 8) == 1
    assert nodes(4, 4, nodes=2) == nodes(16, 8, rotation="hybrid") == 2
    for cp, together in ((4, 4), (4, 8), (12, 8)):
        with pytest.raises(ValueError, match="say with --nodes 2"):
            nodes(cp, together, rotation="hierarchical")
    assert nodes(1, 4, rotation="hybrid") == 1


def test_runs_that_say_what_cannot_be_are_refused(small_run: Run) -> None:
    """Fails if nodes that do not divide, or two ways to choose a rotation, are found out late."""
    with pytest.raises(ValueError, match="nodes=3: must divide the cp=4 ranks"):
        check_run(replace(small_run, cp=4, nodes=3), 4)
    with pytest.raises(ValueError, match="rotation='p2p' is asked for by name"):
        check_run(replace(small_run, calibration="H200", rotation="p2p"), 1)


def placed(group: object, run: Run) -> tuple[int, int, int | None, str]:
    device = torch.device("cpu")
    chosen = chosen_rotation(run, device)
    found = place(run, chosen, make_mesh(run, chosen, device), device)
    rotation = found.rotation if isinstance(found.rotation, str) else found.rotation.name
    return found.dp_rank, found.ranks.world_size, found.ranks.node_size, rotation


def test_axes_are_told_apart_only_where_asked(
    small_run: Run, run_ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    """Fails if "auto" without a table has nodes, with one has none, or dp and cp change places."""
    CPU.save(tmp_path / "mine.json")
    four, two = replace(small_run, cp=4, nodes=2), replace(small_run, cp=2)
    for run, expected in (
        (four, (4, None, "auto")),
        (replace(four, rotation="hybrid"), (4, 2, "hybrid")),
        (replace(four, calibration="cpu"), (4, 2, "cpu")),
        (replace(four, calibration=str(tmp_path / "mine.json")), (4, 2, "cpu")),
        (two, (2, None, "auto")),
        (replace(two, nodes=2, rotation="hierarchical"), (2, 1, "hierarchical")),
        (replace(two, tp=2, nodes=2, rotation="hybrid"), (2, 1, "hybrid")),
    ):
        results = run_ranks(4, placed, run)
        assert [dp for dp, *_ in results] == [rank // run.cp // run.tp for rank in range(4)]
        assert {tuple(rest) for _, *rest in results} == {expected}
    missing = replace(four, calibration=str(tmp_path / "none.json"))
    with pytest.raises(AssertionError, match="No such file") as caught:
        run_ranks(4, placed, missing)
    assert str(caught.value).count("No such file") >= 4
