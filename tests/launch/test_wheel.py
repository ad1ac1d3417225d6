"""The wheel alone, outside of the checkout: what a user gets who has no checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files, in a folder of their own."""
    pytest.importorskip("hatchling", reason="the wheel's builder is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    build = ["wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder), str(ROOT)]
    done = subprocess.run([sys.executable, "-m", "pip", *build], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("lhcp-*.whl")
    with zipfile.ZipFile(file) as packed:
        packed.extractall(folder / "files")
    return folder / "files"


def run(wheel: Path, folder: Path, *command: str) -> str:
    """Run Python where nothing of the checkout is seen."""
    environment = os.environ | {"PYTHONPATH": str(wheel), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_holds_the_library_alone(wheel: Path) -> None:
    """Fails if the console program, the marker of types or the licence is not in it, or more is."""
    tops = {path.name.split("-")[0] for path in wheel.iterdir()}
    assert tops == {"lhcp"} and (wheel / "lhcp" / "py.typed").exists()
    (info,) = wheel.glob("*.dist-info")
    assert "lhcp = lhcp.programs.main:main" in (info / "entry_points.txt").read_text()


def test_it_trains_exports_and_calibrates(wheel: Path, tmp_path: Path) -> None:
    """Fails if a command needs a file of the checkout."""
    pytest.importorskip("safetensors")
    here = run(wheel, tmp_path, "-c", "import lhcp; print(lhcp.__file__)")
    assert here.startswith(str(wheel))
    short = ["--lighthouse-steps", "2", "--dense-steps", "2", "--seqlen", "256"]
    short += ["--lighthouse.topk", "8", "--eval-sequences", "2", "--sample-bytes", "0"]
    run(wheel, tmp_path, "-m", "lhcp", "train", "tiny", "--out", "out", *short)
    export = ("export", "out/two_stages", "--out", "llama")
    assert "written as a Llama" in run(wheel, tmp_path, "-m", "lhcp", *export)
    sizes = ["--seqlens", "128", "--queries", "64", "--keys", "64"]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run(wheel, tmp_path, *torchrun, "-m", "lhcp", "calibrate", "--out", "table.json", *sizes)
    read = "import lhcp; print(lhcp.read_calibration('table.json').name)"
    assert run(wheel, tmp_path, "-c", read).strip() == "cpu"
