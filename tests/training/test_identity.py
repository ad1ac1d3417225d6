"""What a run must share with its checkpoint: refused in words, or gone on with by name."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lhcp.config import LighthouseConfig
from lhcp.training.data import DataConfig, open_data
from lhcp.training.files import read_manifest
from lhcp.training.history import History
from lhcp.training.identity import MAY_CHANGE, Identity, accepted_changes, identity
from lhcp.training.run import Run
from lhcp.training.stages import OptimConfig
from tests.training.test_checkpoint import Silent, do


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(30):
        (folder / f"{index:02d}.txt").write_bytes(torch.randint(97, 122, (900,)).byte().numpy())
    return folder


def name_of(
    run: Run, done: int = 3, dtype: torch.dtype = torch.float32, folder: Path | None = None
) -> Identity:
    files = sorted(folder.iterdir()) if folder else [Path(__file__)]
    return identity(run, run.stages, read_manifest(files), dtype, done)


def flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the numbers and words of a record and of those in it, by name."""
    found: dict[str, Any] = {}
    for name, inside in value.items():
        found |= (
            flat(inside, f"{prefix}{name}.") if isinstance(inside, dict) else {prefix + name: 0}
        )
    return found


def test_every_field_counts_or_says_why_not(small_run: Run) -> None:
    """Fails if a field is added to a run without a word on whether it may change."""
    names = {field.name for field in fields(Run)}
    assert MAY_CHANGE.keys() <= names
    compared = {name.split(".")[0] for name in name_of(small_run)} - {"stages"}
    assert compared == names - MAY_CHANGE.keys()
    free = ("data.text", "short.out")
    inner = {name for name in flat(asdict(small_run)) if "." in name and name not in free}
    assert inner <= name_of(small_run).keys()


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 1e-4},
        {"weight_decay": 0.2},
        {"betas": (0.9, 0.99)},
        {"warmup_steps": 3},
        {"clip": 2.0},
        {"decay": "cosine"},
        {"kind": "sgd"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_optimiser_is_another_run(small_run: Run, change: dict[str, Any]) -> None:
    """Fails if a run takes a checkpoint of other rates and reports its own beside them."""
    before = name_of(small_run)
    now = name_of(replace(small_run, optim=replace(small_run.optim, **change)))
    with pytest.raises(ValueError, match=rf"optim\.{next(iter(change))}: .* there, .* here"):
        accepted_changes(before, now, (), 3, details="")


@pytest.mark.parametrize(
    "change",
    [
        {"seqlen": 256},
        {"global_batch": 8},
        {"seed": 1},
        {"eval_sequences": 8},
        {"data": DataConfig(heldout=0.1)},
        {"lighthouse": LighthouseConfig(num_levels=3, pool_factor=2, topk=64, num_strata=8)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_sizes_are_another_run(small_run: Run, change: dict[str, Any]) -> None:
    before, now = name_of(small_run), name_of(replace(small_run, **change))
    with pytest.raises(ValueError, match=next(iter(change))):
        accepted_changes(before, now, (), 3, details="")


def test_another_dtype_is_another_run(small_run: Run) -> None:
    """Fails if weights of a bf16 run go on in fp32 unsaid; "auto" counts as what it stands for."""
    assert name_of(small_run) == name_of(replace(small_run, dtype="fp32"))
    with pytest.raises(ValueError, match="dtype: float32 there, bfloat16 here"):
        accepted_changes(
            name_of(small_run), name_of(small_run, dtype=torch.bfloat16), (), 3, details=""
        )


def test_what_is_named_may_change(small_run: Run) -> None:
    other = replace(
        small_run, name="x", out="x", cp=2, layout="contiguous", rotation="p2p", accumulate=2
    )
    other = replace(other, dense_steps=9, eval_every=1, checkpoint_every=7, recompute=True)
    assert name_of(small_run) == name_of(other)


def test_only_stages_that_are_done_count(small_run: Run) -> None:
    """Fails if a lighthouse stage cannot be made longer, or one that is over can."""
    longer = replace(small_run, lighthouse_steps=4)
    assert name_of(small_run, done=3) == name_of(longer, done=3)
    assert name_of(small_run, done=4) != name_of(longer, done=4)


def test_a_decaying_rate_counts_all_steps(small_run: Run) -> None:
    decaying = replace(small_run, optim=replace(small_run.optim, decay="linear"))
    with pytest.raises(ValueError, match=r"optim\.decay_over: 5 there, 9 here"):
        accepted_changes(
            name_of(decaying), name_of(replace(decaying, dense_steps=6)), (), 3, details=""
        )


def add(texts: Path) -> None:
    (texts / "new.txt").write_bytes(b"more")


def remove(texts: Path) -> None:
    (texts / "07.txt").unlink()


def rewrite(texts: Path) -> None:
    data = bytearray((texts / "07.txt").read_bytes())
    data[450] ^= 1
    (texts / "07.txt").write_bytes(data)


@pytest.mark.parametrize(
    ("change", "said"),
    [(add, "1 new ('new.txt')"), (remove, "1 gone ('07.txt')"), (rewrite, "1 changed ('07.txt')")],
)
def test_other_text_is_refused(
    one_rank: None,
    small_run: Run,
    texts: Path,
    tmp_path: Path,
    change: Callable[[Path], None],
    said: str,
) -> None:
    """Fails if a run goes on with other bytes than it began with, and holds trained ones out."""
    data = DataConfig(text=(f"{texts}/*.txt",), heldout=0.2)
    run = replace(small_run, seqlen=256, data=data, out=str(tmp_path / "out"))
    do(replace(run, dense_steps=0), Silent())
    change(texts)
    with pytest.raises(ValueError) as refused:
        do(run, Silent())
    assert f"files of the text differ: {said}" in str(refused.value)
    assert str(refused.value).endswith("--accept data.files")

    watcher = Silent()
    _, history = do(replace(run, accept=("data.files",)), watcher)
    assert watcher.started_at == 3 and len(history.steps) == 5
    assert [(c.step, c.name) for c in history.changes] == [(3, "data.files")]
    assert History.from_json(asdict(history)) == history
    # What was accepted is the run's own from then on.
    do(run, watcher)
    assert watcher.started_at == 5


def test_a_text_that_moved_is_the_same(
    one_rank: None, small_run: Run, texts: Path, tmp_path: Path
) -> None:
    run = replace(small_run, seqlen=256, dense_steps=0, out=str(tmp_path / "out"))
    do(replace(run, data=DataConfig(text=(f"{texts}/*.txt",), heldout=0.2)), Silent())
    moved = tmp_path / "elsewhere" / "deep"
    moved.parent.mkdir()
    shutil.move(texts, moved)
    watcher = Silent()
    do(replace(run, data=DataConfig(text=(f"{moved}/*",), heldout=0.2)), watcher)
    assert watcher.started_at == 3


def test_accept_wants_a_name(small_run: Run) -> None:
    name = name_of(small_run)
    with pytest.raises(ValueError, match=r"no field is called lr; there are .*'optim\.lr'"):
        accepted_changes(name, name, ("lr",), 3, details="")


def test_a_checkpoint_of_before_is_named(small_run: Run) -> None:
    """Fails if a checkpoint that recorded less is taken for one that agrees."""
    name = name_of(small_run)
    old = {key: value for key, value in name.items() if key != "optim.lr"}
    with pytest.raises(ValueError, match=r"optim\.lr: not recorded there, 0\.003 here"):
        accepted_changes(old, name, (), 3, details="")


def test_a_long_file_is_known_by_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the first or the last byte, or the size, of a sampled file does not count."""
    monkeypatch.setattr("lhcp.training.files.READ_WHOLE", 1000)
    monkeypatch.setattr("lhcp.training.files.SAMPLE_BYTES", 4)
    text = torch.randint(0, 256, (5000,)).byte().numpy().tobytes()
    digests = set()
    for other in (text, b"~" + text[1:], text[:-1] + b"~", text + b"~"):
        (tmp_path / "x").write_bytes(other)
        digests.add(read_manifest([tmp_path / "x"]).digest)
    assert len(digests) == 4 - (text[0] == 126) - (text[-1] == 126)


def test_data_is_the_same_wherever_it_is(texts: Path) -> None:
    """Fails if what is held out depends on the folder's name."""
    config = DataConfig(text=(f"{texts}/*.txt",), heldout=0.2)
    before = open_data(config, 64, 0)
    moved = texts.rename(texts.with_name("z"))
    after = open_data(replace(config, text=(f"{moved}/*.txt",)), 64, 0)
    kept = [[p.path.name for p in d.heldout.corpus.pieces] for d in (before, after)]
    assert kept[0] == kept[1]


def test_sgd_has_no_decay_and_no_betas() -> None:
    """Fails if a field that does nothing is taken in silence."""
    with pytest.raises(ValueError, match=r"weight_decay=0\.2: sgd is plain"):
        OptimConfig(kind="sgd", weight_decay=0.2)
    with pytest.raises(ValueError, match="betas="):
        OptimConfig(kind="sgd", betas=(0.8, 0.9))


def differ(group: Any, run: Run, texts: Path, what: str) -> str:
    """Train with another learning rate, or other files, on rank 1."""
    if group.rank() == 1 and what == "lr":
        run = replace(run, optim=replace(run.optim, lr=1.0))
    mine = texts / "0*.txt" if group.rank() == 1 and what == "files" else texts / "*.txt"
    data = DataConfig(text=(str(mine),), heldout=0.3)
    with pytest.raises(ValueError) as error:
        do(replace(run, data=data), Silent())
    return str(error.value)


@pytest.mark.parametrize("what", ["lr", "files"])
def test_ranks_of_other_runs_are_named(
    run_ranks: Callable[..., list[Any]], small_run: Run, texts: Path, tmp_path: Path, what: str
) -> None:
    """Fails if a node with other files, or other arguments, trains along."""
    run = replace(small_run, seqlen=256, out=str(tmp_path / "out"))
    for said in run_ranks(2, differ, run, texts, what):
        assert ("optim.lr: 0.003 on rank 0, 1.0 on rank 1" in said) == (what == "lr")
        assert ("data.files: " in said) == (what == "files")


def tied(run: Run) -> Run:
    return replace(run, model=replace(run.model, tied=True))


@pytest.mark.parametrize("change", [tied, lambda run: replace(run, compile=False)])
def test_a_run_goes_on_in_the_middle_of_an_epoch(
    one_rank: None, small_run: Run, texts: Path, tmp_path: Path, change: Callable[[Run], Run]
) -> None:
    """Fails if the order of an epoch, or a weight of two names, is not what it was."""
    data = DataConfig(text=(f"{texts}/*.txt",), heldout=0.2)
    run = change(replace(small_run, seqlen=512, data=data, checkpoint_every=3))
    # 41 sequences an epoch, 4 a step: the checkpoints are in the middle of the first and second.
    run = replace(run, lighthouse_steps=8, dense_steps=9)
    ours, history = do(replace(run, out=str(tmp_path / "whole")), Silent())
    stopped = replace(run, out=str(tmp_path / "stopped"))
    for step in (7, 14):
        with pytest.raises(InterruptedError):
            do(stopped, Silent(stop_after=step))
    theirs, more = do(stopped, Silent())
    assert [r.loss for r in history.steps] == [r.loss for r in more.steps]
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
