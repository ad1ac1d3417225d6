"""Calibrations as files, and the tables by name of rotation."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lhcp.cost.calibration import Calibration, interpolate
from lhcp.cost.choose import choose
from lhcp.cost.schedules import SCHEDULES
from lhcp.cost.tables import CALIBRATIONS, CPU, H200
from lhcp.cost.traffic import TRAFFIC, most_traffic, rotation_memory
from lhcp.ring.rotation import NAMES
from tests.cost.shapes import BASE


def test_calibration_file(tmp_path: Path) -> None:
    """Fails if a calibration changes on disk, if an older one is refused or a wrong one is not."""
    for calibration in CALIBRATIONS.values():
        calibration.save(tmp_path / "c.json")
        assert Calibration.load(tmp_path / "c.json") == calibration
    older = {name: value for name, value in json.loads(CPU.text).items() if name != "byte_compute"}
    (tmp_path / "c.json").write_text(json.dumps(older))
    assert Calibration.load(tmp_path / "c.json") == replace(CPU, byte_compute=0.0)
    (tmp_path / "c.json").write_text('{"name": "x"}')
    with pytest.raises(ValueError, match="does not hold an lhcp calibration"):
        Calibration.load(tmp_path / "c.json")


def test_interpolation() -> None:
    """Fails if the curve misses its points, or leaves them in the wrong direction."""
    points = [(1.0, 2.0), (4.0, 4.0), (16.0, 32.0)]
    assert [interpolate(points, x) for x, _ in points] == pytest.approx([2.0, 4.0, 32.0])
    assert interpolate(points, 2.0) == pytest.approx(2 * 2**0.5)
    assert interpolate(points, 0.25) == pytest.approx(1.0)
    assert interpolate(points, 32.0) == pytest.approx(64.0)


def test_unknown_rotation() -> None:
    """Fails if a rotation that the model does not know gets a number."""
    with pytest.raises(ValueError, match="the cost model knows"):
        most_traffic("carrier pigeon", BASE, "forward")
    with pytest.raises(ValueError, match="the cost model knows"):
        choose(BASE, H200, ("carrier pigeon",))


def test_every_rotation_is_known_everywhere() -> None:
    """Fails if a rotation has a schedule and no bytes, or the other way round."""
    assert set(SCHEDULES) == set(TRAFFIC) == set(NAMES)
    assert all(rotation_memory(name, BASE) > 0 for name in NAMES)
