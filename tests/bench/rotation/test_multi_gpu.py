"""multi_gpu.sh and its page: the order of steps, failures that stop nothing, predictions."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from bench.rotation import overhead
from bench.rotation.multi_gpu_page import main as write_page
from bench.rotation.predict_rows import main as predict_rows
from bench.rotation.predict_rows import on_one_host, predicted, sizes_parser
from lhcp.comm.layout import make_layout
from lhcp.cost.choose import predict
from lhcp.cost.tables import CALIBRATIONS
from lhcp.ring.shape import AttentionShape

ROOT = Path(__file__).parents[3]


def script(out: Path, *arguments: str, seconds: int = 540) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OUT": str(out), "PYTHON": sys.executable}
    environment["SECONDS_LEFT"] = str(seconds)
    return subprocess.run(
        ["bash", "bench/rotation/multi_gpu.sh", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=580,
    )


def page_of(out: Path) -> str:
    """The page, its tables without the padding of their columns."""
    return re.sub(" +", " ", (out / "multi_gpu.md").read_text())


def states(out: Path) -> dict[str, str]:
    document = json.loads((out / "multi_gpu.json").read_text())
    return {name: state for name, state, _ in document["steps"]}


TINY = ("--tiny", "--device", "cpu", "--ranks", "2", "--steps")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--ranks", "3", "--device", "cpu"), "ranks=3: must be 2, 4 or 8"),
        (("--ranks", "8", "--device", "cuda"), "8 ranks on 0 GPUs: fewer --ranks"),
        (("--rnaks", "2"), "--rnaks: not an option"),
        (("--steps",), "--steps needs a value"),
    ],
)
def test_bad_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    """Fails if a mistake starts the steps, or is not named."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = script(tmp_path, *arguments)
    assert done.returncode == 2 and said in done.stderr
    assert not list(tmp_path.iterdir())


def test_no_time_left_is_no_failure_but_is_said(tmp_path: Path) -> None:
    """Fails if a step starts that cannot end, or is left out in silence."""
    done = script(tmp_path, *TINY, "check_small train_256k", seconds=9)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(state.startswith("not run") for state in states(tmp_path).values())
    assert len(json.loads(done.stdout.splitlines()[-1])["not ok"]) == 2


def test_a_failed_step_stops_nothing(tmp_path: Path) -> None:
    """Fails if later steps do not run, the status hides it, or the prediction comes after."""
    # Time for the prediction, and too little for the call that it is of.
    done = script(tmp_path, *TINY, "nonsense dense_w8 check_nothing", seconds=32)
    assert done.returncode == 1
    found = states(tmp_path)
    assert list(found) == ["predict", "nonsense", "dense_w8", "check_nothing"]
    assert found["predict"] == "ok" and found["dense_w8"].startswith("not run")
    assert found["nonsense"] == found["check_nothing"] == "failed, no step has this name"
    page = page_of(tmp_path)
    assert "| dense_w8 | 8 | 1,024 | 1,024 | allgather | both |" in page
    assert len(list(tmp_path.iterdir())) <= 8


def test_predictions_are_the_models() -> None:
    """Fails if a call of overhead.py is predicted at other sizes than it measures."""
    text = (
        "--world 4 --nodes 2 --rotations hierarchical p2p --seqlens 262144 --topk 4096 --levels 4"
    )
    host = on_one_host(CALIBRATIONS["H200"])
    rows = predicted("call", [*text.split(), "--repeats", "3"], host, 2)
    assert [(row["rotation"], row["subsequence"]) for row in rows] == [
        ("hierarchical", 53_248),
        ("p2p", 53_248),
    ]
    layout = make_layout("zigzag", 4)
    shape = AttentionShape(seqlen=53_248, layout=layout, num_heads=8, num_kv_heads=8, head_dim=128)
    found = predict("p2p", shape, host)
    assert rows[1]["both"]["T"] == pytest.approx(1e3 * found.real)
    assert rows[1]["overhead"] == found.overhead
    assert host.outer == host.inner


def test_defaults_are_those_of_overhead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if bench.rotation.overhead gets another default for a size than the prediction has."""
    monkeypatch.setattr(sys, "argv", ["overhead.py"])
    theirs = vars(overhead.arguments())
    ours = vars(sizes_parser().parse_args(["--world", "2"]))
    del ours["world"]
    ours["kv_heads"] = ours["kv_heads"] or ours["heads"]
    assert ours == {name: theirs[name] for name in ours}


def phase(name: str, seconds: float) -> dict[str, Any]:
    timing = {"median": seconds, "low": seconds, "high": seconds}
    derived = {"overhead": 0.05, "exposed": 0.001, "overlap": 0.9, "contention": None}
    rate = {"gigabytes_per_second": 100.0}
    return {"phase": name, "real": timing, "single": timing, **derived, **rate}


def test_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if the page loses a step, a wrong row, or puts the wrong prediction beside a time."""
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    text = "--world 2 --rotations p2p allgather --seqlens 131072 --levels 4"
    predict_rows(["--json", str(work / "predict.json"), "--row", "dense_w2", text])
    (prediction, _) = json.loads((work / "predict.json").read_text())["rows"]
    setting = {"seqlen": 131_072, "subsequence": 131_072, "world_size": 2, "rotation": "p2p"}
    seconds = {"forward": 0.03, "backward": 0.08, "both": 0.11}
    report = {"setting": setting, "layer": [], "extrapolated": True, "timeline": [1, 2, 3]}
    report["phases"] = [phase(name, value) for name, value in seconds.items()]
    card = {"device": "a card", "world_size": 2, "commit": "abc"}
    (work / "dense_w2.json").write_text(json.dumps({"card": card, "reports": [report]}))
    row = {"check": "float64", "kind": "dense", "seqlen": 8, "rotation": "auto", "took": "p2p"}
    row |= {"backend": "cpu", "wrong": "rank 1: out is off", "error": {"out": 1e-3}}
    checked = {"card": card, "rows": [row], "peer_missing": "no package", "wrong": ["out is off"]}
    (work / "check_small.json").write_text(json.dumps(checked))
    steps = (
        "predict\tok\t1\ncheck_small\tfailed, status 1\t9\ndense_w2\tok\t9\ntrain_1m\tnot run\t0\n"
    )
    (work / "steps.tsv").write_text(steps)
    write_page(["--work", str(work), "--out", str(out), "--commit", "1234567"])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["not ok"] == ["check_small: failed, status 1", "train_1m: not run"]
    assert last["wrong"] == ["out is off"]
    page = page_of(out)
    for part in ("- commit: 1234567", "**Wrong:** out is off", "auto (p2p)", "rank 1: out is off"):
        assert part in page
    (line,) = (x for x in page.splitlines() if "| p2p | both |" in x)
    guess = prediction["both"]["T"]
    assert f"{guess:.3f} / 110.000 ({110 / guess:.2f})" in line
    assert "55.000* | 5.0 | 90 | - | 100 |" in line
    # The other rotation was predicted and did not run.
    (line,) = (x for x in page.splitlines() if "| allgather | both |" in x)
    assert " / - |" in line
    whole = json.loads((out / "multi_gpu.json").read_text())
    assert "timeline" not in whole["documents"]["dense_w2"]["reports"][0]


@pytest.mark.slow
def test_tiny_run(tmp_path: Path) -> None:
    """Fails if a kind of step does not run from end to end, on two gloo ranks."""
    done = script(tmp_path, *TINY, "check_small l4_w2 dense_w2 peer_w2 train_256k check_long")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert set(states(tmp_path).values()) == {"ok"}
    names = {path.name for path in tmp_path.iterdir()}
    drawings = {"timeline_l4_w2.png", "timeline_dense_w2.png"}
    assert names - drawings == {"multi_gpu.md", "multi_gpu.json", "steps.log"}
    assert not find_spec("matplotlib") or drawings <= names
    documents = json.loads((tmp_path / "multi_gpu.json").read_text())["documents"]
    assert documents["check_small"]["wrong"] == documents["check_long"]["wrong"] == []
    assert any(row["check"] == "compiled" for row in documents["check_small"]["rows"])
    modes = [row["mode"] for row in documents["train_256k"]["rows"]]
    assert modes == ["lighthouse", "dense"]
    assert all(row["rotation_share"] > 0 for row in documents["train_256k"]["rows"])
