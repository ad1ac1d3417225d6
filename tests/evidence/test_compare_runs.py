"""compare_runs says which run is another: on each side of its budget."""

import json
from pathlib import Path

import pytest

from tests.evidence.compare_runs import main


def written(folder: Path, losses: list[float], first: int = 1) -> str:
    (folder / "two_stages").mkdir(parents=True)
    lines = [
        {"kind": "step", "step": step, "stage": "dense", "loss": loss, "grad_norm": 1.0}
        | {"seconds": 0.5, "peak_gib": None}
        for step, loss in enumerate(losses, first)
    ]
    text = "\n".join(json.dumps(line) for line in [*lines, {"kind": "eval", "step": 1}])
    (folder / "two_stages" / "metrics.jsonl").write_text(text)
    return str(folder)


def test_a_run_of_other_losses_is_named(tmp_path: Path) -> None:
    one = written(tmp_path / "one", [5.0, 4.0, 3.0])
    near = written(tmp_path / "near", [4.00002, 3.0], first=2)
    far = written(tmp_path / "far", [5.0, 4.0002, 3.0])
    out = tmp_path / "page"
    main([one, near, "--out", str(out)])
    document = json.loads(out.with_suffix(".json").read_text())
    assert len(document["records"]["compared"][0]["losses"]) == 2
    with pytest.raises(SystemExit, match=r"far: a loss differs by 5.0e-05"):
        main([one, near, far])


def test_runs_without_a_common_step_are_no_evidence(tmp_path: Path) -> None:
    one, other = written(tmp_path / "one", [5.0]), written(tmp_path / "other", [4.0], first=2)
    with pytest.raises(SystemExit, match="no step that the first run did too"):
        main([one, other])


def test_a_control_sets_the_budget(tmp_path: Path) -> None:
    """Fails if a run may differ by more than twice what rounding alone does, or by no more than the
    fixed budget."""
    one = written(tmp_path / "one", [5.0, 4.0])
    control = written(tmp_path / "control", [5.0, 4.04])
    near, far = written(tmp_path / "near", [5.09, 4.0]), written(tmp_path / "far", [5.11, 4.0])
    main([one, near, "--control", control])
    main([one, far, "--control", control, written(tmp_path / "other", [5.0, 4.05])])
    with pytest.raises(SystemExit, match=r"far: a loss differs by 2.2e-02"):
        main([one, near, far, "--control", control])
    with pytest.raises(ValueError, match="no loss differs from one's"):
        main([one, near, "--control", one])
