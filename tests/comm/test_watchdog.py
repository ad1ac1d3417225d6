"""Ranks that wait in vain say for whom, all of them, and end."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import lhcp
from lhcp.comm.watchdog import STATUS, RanksLost, Watchdog
from lhcp.testing.inputs import small_config
from tests.comm.stalls import freeze, go_astray, run_ranks

WORLD, TIMEOUT = 3, 1.2
CONFIG, SEQLEN = small_config(num_strata=6)


def steps(rank: int, folder: Path, fault: str) -> None:
    """Do steps with messages; rank 1 goes astray in the backward of step 3."""
    x = torch.ones(4)
    with Watchdog(timeout=TIMEOUT) as watchdog:
        for step in (1, 2, 3, 4):
            watchdog.at("forward", step)
            dist.all_reduce(x)
            watchdog.at("backward", step)
            if step == 3 and rank == 1:
                go_wrong(fault, folder)
            dist.all_reduce(x)


def go_wrong(fault: str, folder: Path) -> None:
    # Where it is is posted once a beat.
    time.sleep(0.3)
    if fault == "frozen":
        freeze(folder)
    go_astray(folder)
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "hung":
        time.sleep(60)
    elif fault == "error":
        raise ValueError("only here")


def test_a_frozen_rank_is_named_by_the_others(tmp_path: Path) -> None:
    """Fails if a wait for a frozen rank is silent, far too long, or ends as a success."""
    ended = run_ranks(tmp_path, WORLD, steps, "frozen")
    for rank in (0, 2):
        assert ended[rank].code == STATUS
        said = ended[rank].said
        assert f"rank {rank} of 3 ends, after " in said
        assert "rank 1 was last heard in step 3, backward, " in said
        assert "ranks 0 and 2 wait in step 3, backward" in said
        assert "its main thread: " in said and "test_watchdog.py" in said
        assert TIMEOUT - 0.5 < ended[rank].seconds < 3 * TIMEOUT
    assert ended[1].code is None


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("killed", "rank 1 was last heard in step 3, backward, "),
        ("error", "rank 1 ended in step 3, backward: ValueError: only here"),
    ],
)
def test_a_dead_rank_is_named_by_the_others(tmp_path: Path, fault: str, words: str) -> None:
    """Fails if survivors say no more than that a connection was closed, or do not say even that."""
    ended = run_ranks(tmp_path, WORLD, steps, fault)
    for rank in (0, 2):
        assert words in ended[rank].said and "ranks 0 and 2 wait in step 3" in ended[rank].said
        if fault == "error" and ended[rank].code == STATUS:
            # Its last word may come before its connection closes.
            continue
        assert ended[rank].code == 1 and "RanksLost: " in ended[rank].said
        # The error of the connection, which this one is of.
        assert "The above exception was the direct cause" in ended[rank].said
    assert ended[1].code == (-signal.SIGKILL if fault == "killed" else 1)


def test_a_rank_that_lives_and_does_not_move_is_told_from_a_dead_one(tmp_path: Path) -> None:
    """Fails if a rank's own hang is taken for its death, or it does not say where it hangs."""
    ended = run_ranks(tmp_path, WORLD, hung)
    for one in ended:
        assert one.code == STATUS
        assert "rank 1 is alive and has not moved from step 3, forward for " in one.said
        assert "ranks 0 and 2 wait in step 3, backward" in one.said
    assert "go_wrong" in ended[1].said


def hung(rank: int, folder: Path) -> None:
    with Watchdog(timeout=TIMEOUT) as watchdog:
        watchdog.at("forward", 3)
        if rank == 1:
            go_wrong("hung", folder)
        watchdog.at("backward", 3)
        dist.barrier()


def other_calls(rank: int, folder: Path, fault: str) -> None:
    """Make attention calls that all ranks know; at the third, rank 1 makes another of them."""
    x = torch.randn(1, SEQLEN // WORLD, 2, 8, dtype=torch.float64)
    with Watchdog(timeout=TIMEOUT) as watchdog:
        scales = (0.1, 0.3)
        for scale in scales:
            lhcp.ring_attention(x, x, x, group=dist.group.WORLD, scale=scale, rotation="p2p")
        watchdog.at("forward", 6)
        go_astray(folder)
        others = {"scale": scales[1], "new": 0.7}
        own = others.get(fault, scales[0]) if rank == 1 else scales[0]
        calls = 2 if fault == "extra" and rank == 1 else 1
        for _ in range(calls):
            lhcp.ring_attention(x, x, x, group=dist.group.WORLD, scale=own, rotation="p2p")
        if fault == "scale" and rank == 1:
            time.sleep(60)
        dist.barrier()


@pytest.mark.parametrize("fault", ["extra", "scale", "new"])
def test_other_calls_are_named(tmp_path: Path, fault: str) -> None:
    """Fails if ranks that wait do not say that one made another call, or which."""
    for one in run_ranks(tmp_path, WORLD, other_calls, fault):
        assert one.code == STATUS
        assert "the ranks' attention calls differ: " in one.said
        if fault == "extra":
            assert (
                "ranks 0 and 2 are at attention call 3, rank 1 is at attention call 4" in one.said
            )
        else:
            other = {"scale": 0.3, "new": 0.7}[fault]
            assert "ranks 0 and 2 are at attention call 3 (scale: 0.1)" in one.said
            assert f"rank 1 is at attention call 3 (scale: {other})" in one.said


def patient(rank: int, folder: Path) -> None:
    """Rank 1 saves for longer than a step may take, and the others wait for it in the next."""
    with Watchdog(timeout=1.0) as watchdog:
        watchdog.at("save", 1, patience=4)
        if rank == 1:
            time.sleep(2.5)
        watchdog.at("forward", 2)
        dist.barrier()
    # Another one, of the same group.
    with Watchdog(timeout=1.0) as watchdog:
        watchdog.at("forward", 1)
        dist.barrier()


def test_a_rank_that_is_rightly_busy_is_waited_for(tmp_path: Path) -> None:
    """Fails if a save of one rank ends the others, or a watchdog reads one's of before it."""
    assert [one.code for one in run_ranks(tmp_path, WORLD, patient)] == [0, 0, 0]


def early(rank: int, folder: Path) -> None:
    with Watchdog(timeout=TIMEOUT) as watchdog:
        watchdog.at("forward", 1)
        if rank == 1:
            return
        watchdog.at("backward", 1)
        # Of rank 1's process, which stays: it is done, not dead.
        dist.barrier()


def stays(rank: int, folder: Path) -> None:
    early(rank, folder)
    freeze(folder)


def test_a_rank_that_is_done_is_said_to_be(tmp_path: Path) -> None:
    """Fails if ranks that make more steps than another think it dead."""
    ended = run_ranks(tmp_path, WORLD, stays)
    for rank in (0, 2):
        assert ended[rank].code == STATUS
        assert "rank 1 was done after step 1, forward, and left" in ended[rank].said


def unmarked(rank: int, folder: Path) -> None:
    with Watchdog(timeout=1.0):
        # Nobody marks: however long it takes, it is nobody's business.
        time.sleep(1.6)
        dist.barrier()
        if rank == 1:
            freeze(folder)
        dist.barrier()


def test_without_marks_a_frozen_rank_is_seen_and_a_long_step_is_not(tmp_path: Path) -> None:
    ended = run_ranks(tmp_path, WORLD, unmarked)
    for rank in (0, 2):
        assert ended[rank].code == STATUS
        assert "rank 1 was last heard in start, " in ended[rank].said


def stopped_together(rank: int, folder: Path) -> None:
    """All ranks are stopped for longer than the timeout, and go on."""
    with Watchdog(timeout=1.0) as watchdog:
        watchdog.at("forward", 1)
        dist.barrier()
        if os.fork() == 0:
            time.sleep(2)
            os.kill(os.getppid(), signal.SIGCONT)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.3)
        dist.barrier()


def test_time_in_which_all_were_stopped_does_not_count(tmp_path: Path) -> None:
    """Fails if a job that is suspended and goes on is ended for it."""
    assert [one.code for one in run_ranks(tmp_path, WORLD, stopped_together)] == [0, 0, 0]


def test_one_rank_needs_nothing() -> None:
    with Watchdog() as watchdog:
        watchdog.at("forward", 1)
    assert str(watchdog.place) == "step 1, forward"


@pytest.mark.parametrize("timeout", [0, -1.0, float("inf"), float("nan")])
def test_a_timeout_is_a_number_of_seconds(timeout: float) -> None:
    with pytest.raises(ValueError, match=r"timeout=.*positive number of seconds"):
        Watchdog(timeout=timeout)


def test_what_is_raised_is_a_runtime_error() -> None:
    """Fails if code that catches torch's errors of messages no longer catches them."""
    assert issubclass(RanksLost, RuntimeError)
