"""The doctor: what it finds wrong, and that all ranks hear the same."""

import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from lhcp.comm.mesh import Ranks, as_ranks
from lhcp.layer.plan import choose_backend, why_not
from lhcp.machine import loaded_files
from lhcp.measure import doctor
from lhcp.measure.doctor import Patient, examine
from lhcp.measure.examine import differences, own_troubles, usable_cores
from lhcp.measure.links import pair_rates
from lhcp.testing.ranks import RankPool

CPU = torch.device("cpu")
SMALL = Patient(seqlen=250, num_heads=2, num_kv_heads=1, head_dim=8, dtype=torch.float32)


def test_switches_that_slow_a_run_are_named() -> None:
    """Fails if one is passed over, or one that does no harm is named."""
    quiet = own_troubles(CPU, 1, {"TRITON_INTERPRET": "0", "NCCL_DEBUG": "INFO"})
    found = own_troubles(CPU, 1, {"TRITON_INTERPRET": "True", "NCCL_P2P_DISABLE": "1"})
    assert [t for t in found if t not in quiet] == found[:2]
    said = " ".join(map(str, found[:2]))
    assert "TRITON_INTERPRET=True: " in said and "Unset NCCL_P2P_DISABLE" in said


def test_ranks_that_share_cores_are_named(one_thread: None) -> None:
    cores = usable_cores()
    assert not [t for t in own_troubles(CPU, cores, {}) if "threads" in t.what]
    (found,) = [t for t in own_troubles(CPU, 3 * cores, {}) if "threads" in t.what]
    assert f"{3 * cores} ranks with 1 threads each share {cores} cores" in found.what
    assert "OMP_NUM_THREADS=1" in found.change


def test_ranks_that_differ_are_named() -> None:
    same = {"torch": "2.13", "host": "a", "device": "cpu"}
    assert differences([same, same | {"host": "b"}]) == []
    (found,) = differences([same, same, same | {"torch": "2.12"}])
    assert "torch is 2.13 on rank 0 and 2.12 on rank 2 (ranks [2] differ)" in found.what


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what is mapped")
def test_a_library_is_found_where_it_was_loaded() -> None:
    """Fails if the path is not that of the file."""
    found = loaded_files("libtorch_cpu")
    assert found and all(path.is_file() for path in found)
    assert Path(torch.__file__).parent / "lib" / "libtorch_cpu.so" in found


def test_every_backend_has_its_reason() -> None:
    """Fails if one that can is refused, or the one that is chosen is not among those that can."""
    reasons = why_not(torch.float64, 8, CPU)
    able = [name for name, reason in reasons.items() if reason is None]
    assert choose_backend("auto", torch.float64, 8, CPU).name in able and "math" in able
    assert "cuda" in str(reasons["cudnn"])


def pairs(group: Any) -> dict[tuple[int, int], float]:
    return pair_rates(as_ranks(group), CPU, 4096)


def test_each_pair_is_measured(ranks: RankPool) -> None:
    answers = ranks.run(pairs, 4)
    assert list(answers[0]) == list(combinations(range(4), 2))
    assert all(answer == answers[0] and min(answer.values()) > 0 for answer in answers)


def test_a_slow_pair_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a pair at a third of the others' rate is not seen, or one at two thirds is."""
    rates = {(0, 1): 9e9, (0, 2): 6e9, (1, 2): 9e9, (0, 3): 9e9, (1, 3): 3e9, (2, 3): 9e9}
    monkeypatch.setattr(doctor, "link", lambda *_: {"latency_us": 1.0, "gb_s": 1.0})
    monkeypatch.setattr(doctor, "gather_rate", lambda *_: 1e9)
    monkeypatch.setattr(doctor, "pair_rates", lambda *_: rates)
    lines, (trouble,) = doctor._links(Ranks(), CPU)
    assert "3.00 to 9.00 GB/s" in lines[-1]
    assert "1-3 3.00; median 9.00" in trouble.what and "0-2" not in trouble.what


def look(group: Any) -> str:
    return str(examine(as_ranks(group), CPU, SMALL))


def test_all_ranks_hear_the_same(ranks: RankPool) -> None:
    """Fails if a part is missing, or ranks differ in what they are told."""
    first, second = ranks.run(look, 2)
    assert first == second
    for said in (
        "N=256 (padded from 250)",
        "backend   cpu         taken",
        "backend   cudnn       cannot: inputs are on cpu",
        "rotation  ",
        "`lhcp calibrate`",
        "messages round the ring",
        "pairs, one at a time",
        "forward + backward",
    ):
        assert said in first
    # The tests let Triton interpret.
    assert "Unset TRITON_INTERPRET" in first.split("\nwrong\n")[1]


def test_one_process_is_enough() -> None:
    said = str(examine(Ranks(), CPU, SMALL))
    assert "rotation  none: one rank" in said and "pairs" not in said
