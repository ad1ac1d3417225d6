"""The evidence on gloo ranks: its formula, and that a wrong answer ends a program with status 1."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lhcp import reference
from lhcp.comm.mesh import as_ranks
from lhcp.config import LighthouseConfig
from lhcp.testing.inputs import qkv, small_config
from lhcp.testing.ranks import RankPool
from lhcp.testing.tolerance import assert_close_float64

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import error_by_ranks
import long_cpu
import netns
from evidence import Page
from long_formula import at_positions
from namespaces import NotAllowed, nodes

right_errors, right_long = error_by_ranks.answer, long_cpu.answer

SHAPES = [
    # levels, pool factor, strata, picks, heads, kv heads
    (2, 2, 1, 2, 1, 1),
    (3, 2, 8, 2, 4, 2),
    (3, 4, 4, 2, 3, 1),
    (4, 4, 2, 4, 2, 2),
    (4, 2, 8, 4, 4, 2),
    (2, 8, 2, 2, 1, 1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula_is_the_reference(shape: tuple[int, ...]) -> None:
    """Fails if one term of one position is missing: all positions, blocks that do not divide S."""
    *sizes, heads, kv_heads = shape
    config, seqlen = small_config(*sizes)
    inputs = qkv(seqlen, num_heads=heads, num_kv_heads=kv_heads, head_dim=4, seed=sum(shape))
    q, k, v, dout = inputs
    selection = reference.select(*reference.token_scores(q, k, v, config), config)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = reference.lighthouse_attention(*leaves, config=config, selection=selection)
    wanted = (out.detach(), *torch.autograd.grad(out, leaves, dout))
    found, lse = at_positions(inputs, config, selection, torch.arange(seqlen), block=7)
    for name, got, want in zip(found._fields, found, wanted, strict=True):
        assert_close_float64(name, got, want[0], budget=1e-13)
    assert lse > 0


def test_formula_refuses_a_batch() -> None:
    """Fails if all but the first sequence of a batch were left out in silence."""
    config, seqlen = small_config()
    inputs = qkv(seqlen, batch=2)
    selection = reference.select(*reference.token_scores(*inputs[:3], config), config)
    with pytest.raises(ValueError, match="a batch of 2"):
        at_positions(inputs, config, selection, torch.arange(4))


def test_samples_reach_what_can_go_wrong() -> None:
    """Fails if no sample gets rows of another rank, or none is an entry itself."""
    config = LighthouseConfig(num_levels=3, pool_factor=2, topk=16, num_strata=8)
    setting = long_cpu.Setting(256, config, 1, 1, 4, torch.float64)
    selection = long_cpu.select(setting, setting.inputs(list(range(8))))
    positions = long_cpu.sample(selection, setting, 24).tolist()
    assert len(set(positions)) == 24 and {0, 1, 255} <= set(positions)
    starts = set(range(32, 256, 32))
    assert len(starts & set(positions)) >= 4
    tokens = set(selection.indices[selection.levels == 0].tolist())
    assert len(tokens & set(positions)) >= 6


def on_rank_one(group: Any) -> bool:
    return as_ranks(group).rank == 1


def wrong_errors(group: Any, *args: Any) -> Any:
    """dk of rank 1 a hundredth too large."""
    (out, dq, dk, dv), entries = right_errors(group, *args)
    return (out, dq, dk * 1.01 if on_rank_one(group) else dk, dv), entries


def nan_errors(group: Any, *args: Any) -> Any:
    """One row of rank 1 that nothing wrote."""
    (out, *grads), entries = right_errors(group, *args)
    if on_rank_one(group):
        out[0, 0] = torch.nan
    return (out, *grads), entries


def other_entries(group: Any, *args: Any) -> Any:
    """Rank 1's entries in another order."""
    parts, entries = right_errors(group, *args)
    if entries is not None and on_rank_one(group):
        entries = (entries[0], entries[1].roll(1))
    return parts, entries


def wrong_long(group: Any, *args: Any) -> Any:
    """dk of rank 1 a hundredth too large."""
    found = right_long(group, *args)
    if on_rank_one(group):
        found["rows"][2] *= 1.01
    return found


def other_entries_long(group: Any, *args: Any) -> Any:
    """Rank 1's entries in another order."""
    found = right_long(group, *args)
    if on_rank_one(group):
        found["entries"] = (found["entries"][0], found["entries"][1].roll(1))
    return found


ERRORS = "--ranks 2 4 --rotations allgather hierarchical --dtypes float32 --seqlen 256 --seeds 2"
ERRORS += " --layer-seqlen 512 --topk 16 --strata 8 --head-dim 16"
LONG = "--seqlen 2048 --ranks 4 --nodes 2 --levels 3 --topk 32 --strata 16 --dtypes {}"


def end_of(program: Any, pool: RankPool, command: str, out: Path) -> tuple[Any, dict[str, Any]]:
    """What the program hands to sys.exit, None if it just ends, and its JSON."""
    code: Any = None
    try:
        program.report(program.parse([*command.split(), "--out", str(out)]), pool)
    except SystemExit as ended:
        code = ended.code
    assert "| dk |" in out.with_suffix(".md").read_text()
    return code, json.loads(out.with_suffix(".json").read_text())


def test_errors_that_hold(ranks: RankPool, tmp_path: Path) -> None:
    """Fails if a right answer does not hold, or a row is missing."""
    code, document = end_of(error_by_ranks, ranks, ERRORS, tmp_path / "page")
    assert code is None and document["wrong"] == []
    # Two rotations, dense and the layer, four tensors, two errors.
    assert len(document["records"]) == 2 * 2 * 4 * 2
    assert all(set(record["by_ranks"]) == {"1", "2", "4"} for record in document["records"])
    assert all(0 < record["by_ranks"]["1"] < 1e-5 for record in document["records"])


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (wrong_errors, "float32, dense, S=256, allgather, dk"),
        (nan_errors, "float32, dense, S=256, allgather, out: inf"),
        (other_entries, "allgather, W=2: other entries than on one rank"),
    ],
    ids=["gradient", "nan", "entries"],
)
def test_errors_that_do_not_hold(
    ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Any, said: str
) -> None:
    """Fails if a wrong gradient, a NaN or a wrong selection on one rank ends with status 0."""
    monkeypatch.setattr(error_by_ranks, "answer", answer)
    code, document = end_of(error_by_ranks, ranks, ERRORS, tmp_path / "page")
    # A string: Python prints it and ends with status 1.
    assert isinstance(code, str) and said in code
    assert any(said in wrong for wrong in document["wrong"])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_long_that_holds(ranks: RankPool, tmp_path: Path, dtype: str) -> None:
    """Fails if the ranks differ from the formula, or a rotation is missing."""
    code, document = end_of(long_cpu, ranks, LONG.format(dtype), tmp_path / "page")
    assert code is None and document["wrong"] == []
    rows = [(r["rotation"], r["tensor"]) for r in document["records"] if "tensor" in r]
    assert len(rows) == 8 and ("p2p", "dk") in rows and ("hierarchical", "out") in rows


@pytest.mark.parametrize(
    ("answer", "dtype", "said"),
    [
        (wrong_long, "float32", "p2p, dk: error"),
        (wrong_long, "float64", "hierarchical, dk: error"),
        (other_entries_long, "float32", "p2p: selection equal False"),
    ],
    ids=["gradient", "gradient64", "entries"],
)
def test_long_that_does_not_hold(
    ranks: RankPool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: Any,
    dtype: str,
    said: str,
) -> None:
    """Fails if a wrong gradient or a wrong selection on one rank ends with status 0."""
    monkeypatch.setattr(long_cpu, "answer", answer)
    code, document = end_of(long_cpu, ranks, LONG.format(dtype), tmp_path / "page")
    assert isinstance(code, str) and said in code and said in "; ".join(document["wrong"])


def test_training_must_fall_in_both_stages() -> None:
    """Fails if a loss that rises, stays or is missing in one stage passes for one that falls."""

    def ok(lighthouse: list[float], dense: list[float]) -> list[bool]:
        stages = {"lighthouse": lighthouse, "dense": dense}
        steps = [
            {"stage": stage, "loss": loss, "seconds": 1.0}
            for stage, losses in stages.items()
            for loss in losses
        ]
        return [row["ok"] for row in netns.falls({"history": {"steps": steps}})]

    assert ok([5, 4, 4.5, 3], [3.2, 3, 2.9]) == [True, True]
    assert ok([5, 4, 3], [3, 2, 3]) == [True, False]
    assert ok([5, 6], [3, 2]) == [False, True]
    assert ok([5, float("nan")], []) == [False, False]


def test_exposed_time_off_the_model_is_named() -> None:
    """Fails if a row beyond the bounds is shown as right, or an unshaped link is judged."""
    times = {"T": 100.0, "C": 60.0, "M": 50.0, "exposed": 40.0}
    right = {"bytes": 1, "predicted": times, "measured": times}
    off = right | {"measured": times | {"exposed": 60.0}}
    document = {
        "records": [{"rotation": "p2p", "forward": right, "backward": off}],
        "calibration": {"outer": {"bandwidth": 1e6, "latency": 1e-3}},
    }
    page = Page("a title")
    netns.show(page, "free", None, document)
    assert page.wrong == []
    netns.show(page, "balanced", 100.0, document)
    assert page.wrong == ["balanced, p2p backward: 1.50"]
    with pytest.raises(SystemExit, match="p2p backward"):
        page.close(None, [])


def test_nodes_are_removed_when_told_to_end() -> None:
    """Fails if a program that is ended leaves its namespaces, or what runs on them, behind."""
    try:
        with nodes(1):
            pass
    except NotAllowed as error:
        pytest.skip(str(error))
    program = (
        "import subprocess, namespaces\n"
        "with namespaces.nodes(1) as network:\n"
        "    inside = subprocess.Popen(['ip', 'netns', 'exec', network.names[0], 'sleep', '60'])\n"
        "    print(inside.pid, flush=True)\n"
        "    inside.wait()\n"
    )
    bench = Path(netns.__file__).parent
    running = subprocess.Popen(
        [sys.executable, "-c", program], cwd=bench, stdout=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    inside = int(running.stdout.readline())
    running.terminate()
    assert running.wait(30) == 1
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert f"lhcp{running.pid}-" not in left
    assert not Path(f"/proc/{inside}").exists()
