"""How ranks find one another: absent ones are named, what an earlier attempt left is not read."""

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from time import monotonic, sleep

import pytest
import torch.distributed as dist

from lhcp.training import meeting
from lhcp.training.meeting import RanksMissing, meet
from lhcp.training.process import join


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> int:
    """A free port of this machine, where ranks are to meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(meeting, "FAREWELL", 1.0)
    return port


@pytest.mark.usefixtures("place")
def test_absent_ranks_are_named_by_all_that_came() -> None:
    """Fails if a rank waits longer than it was told to, or does not hear who is missing."""
    begin = monotonic()
    with ThreadPoolExecutor() as pool:
        came = [pool.submit(meet, rank, 4, 1.0) for rank in (0, 2)]
        said = [str(one.exception()) for one in came]
    assert said[0] == said[1]
    assert "2 of 4 joined, ranks 1, 3 missing after 1 s" in said[0]
    assert monotonic() - begin < 10


def listening(port: int) -> set[str]:
    """Return the addresses, as Linux writes them, at which somebody listens on a port."""
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    here = [words[1].split(":") for words in lines if words[3] == "0A"]
    return {address for address, number in here if int(number, 16) == port}


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="Linux tells who listens where")
def test_the_store_listens_where_ranks_meet_and_nowhere_else(place: int) -> None:
    """Fails if a run on one machine can be reached, and read, from another."""
    with ThreadPoolExecutor() as pool:
        stores = list(pool.map(lambda rank: meet(rank, 2, 10.0), range(2)))
    assert listening(place) == {"0100007F"}
    del stores


@pytest.mark.parametrize(("host", "stays"), [("127.0.0.1", True), ("192.0.2.7", False)])
def test_messages_of_one_machine_stay_on_it(
    monkeypatch: pytest.MonkeyPatch, host: str, stays: bool
) -> None:
    """Fails if gloo takes the machine's outer interface for ranks that meet on the inner one."""
    monkeypatch.setenv("MASTER_ADDR", host)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    meeting.stay_on_this_machine()
    assert os.environ.get("GLOO_SOCKET_IFNAME", "") == ("lo" if stays else "")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    meeting.stay_on_this_machine()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"


@pytest.mark.usefixtures("place")
def test_a_missing_rank_0_is_named() -> None:
    with pytest.raises(RanksMissing, match=r"rank 1 of 2 came, and rank 0 did not answer at 127"):
        meet(1, 2, 1.0)


def test_an_attempt_reads_nothing_of_the_one_before(
    place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a rank that comes first takes the word, or the addresses, of an earlier attempt."""
    store = dist.TCPStore("127.0.0.1", place, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for attempt in range(3):
        with ThreadPoolExecutor() as pool:
            coming = {}
            for rank in (2, 1, 0):
                coming[rank] = pool.submit(meet, rank, 3, 20.0)
                sleep(0.2)
            met = {rank: one.result() for rank, one in coming.items()}
        assert not met[1].check(["address"]) and not met[2].check(["address"])
        met[0].set("address", str(attempt))
        assert met[1].get("address") == met[2].get("address") == str(attempt).encode()
    del store


def test_ranks_without_a_place_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if each of several ranks would train alone, or the error is torch's."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ValueError, match=r"WORLD_SIZE=2 without MASTER_ADDR: .*torchrun"):
        join()


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf")])
def test_a_timeout_is_a_number_of_seconds(timeout: float) -> None:
    with pytest.raises(ValueError, match=r"timeout=.*positive number of seconds"):
        join(timeout)


def test_the_timeout_is_that_of_messages_too(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if --timeout holds for the start alone: the group's store and groups must have it."""
    if dist.is_initialized():
        pytest.skip("this process is in a group of other tests")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "99")
    join(37.0)
    try:
        from lhcp.comm.torch_private import store_of

        assert store_of(dist.group.WORLD).timeout == timedelta(seconds=37)
    finally:
        dist.destroy_process_group()
