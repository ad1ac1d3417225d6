"""README's command for torchtitan trains, as it stands there, on two ranks as on one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(folder: Path, ranks: int, *arguments: str) -> tuple[str, str]:
    """Train on CPU ranks; return what was printed and what went wrong."""
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "TITAN_FOLDER": str(folder),
    }
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", str(ranks), "tests/launch/train_titan.py", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    return done.stdout, done.stderr


def numbers(printed: tuple[str, str]) -> list[tuple[str, list[float]]]:
    # Lines of two ranks may come without a break between them.
    pattern = r"rank \d: (\S+) first (\S+) norm (\S+) last (\S+) entropy ([\d.]+)"
    found = re.findall(pattern, printed[0])
    assert found, "".join(printed)
    return [(modes, [float(x) for x in rest]) for modes, *rest in found]


@pytest.mark.slow
def test_the_command_trains_as_one_rank(tmp_path: Path) -> None:
    """Fails if the order of tokens, what is sent, or the gradient is wrong: the first loss and the
    first grad norm are one rank's, and text that was never seen ends below the entropy of its
    bytes."""
    pytest.importorskip("torchtitan")
    ((_, (loss, norm, *_)),) = numbers(run(tmp_path, 1, "1"))
    both = numbers(run(tmp_path, 2, "32"))
    assert len(both) == 2
    for modes, (first, first_norm, last, entropy) in both:
        assert modes == "dense-lighthouse"
        assert (first, first_norm) == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-4))
        assert last < entropy


@pytest.mark.slow
def test_documents_that_are_kept_apart_train_as_on_one_rank(tmp_path: Path) -> None:
    """Fails if ranks read other documents of their parts than one rank does of the whole."""
    pytest.importorskip("torchtitan")
    ((_, (loss, norm, *_)),) = numbers(run(tmp_path, 1, "1", "documents", "kept"))
    ((_, (whole, *_)),) = numbers(run(tmp_path, 1, "1"))
    assert abs(whole - loss) > 1e-4
    for _, (first, first_norm, *_) in numbers(run(tmp_path, 2, "1", "documents", "kept")):
        assert (first, first_norm) == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-4))


@pytest.mark.slow
def test_documents_are_refused_where_nobody_said_that_they_are_one_text(tmp_path: Path) -> None:
    """Fails if torchtitan's masks between documents are dropped in silence."""
    pytest.importorskip("torchtitan")
    printed, wrong = run(tmp_path, 2, "1", "documents")
    assert "first" not in printed
    for rank in (0, 1):
        assert re.search(rf"rank{rank}.*ValueError: .*whole_sequences in override.imports", wrong)
