"""How the ranks of a run meet: through a store, by name, in the attempt that is theirs.

torchrun keeps one store over all its restarts, and on several machines their agents do not count
those alike. So rank 0 offers a word that no attempt had before, each rank answers it with a word of
its own, and rank 0 lists the answers; a rank goes on when its own is among them. What an earlier
attempt left in the store has other words. From then on the store is read and written under the word
of the attempt, and whoever does not come within the time is named.
"""

import errno
import json
import os
import secrets
import socket
from datetime import timedelta
from ipaddress import ip_address
from time import monotonic, sleep

import torch.distributed as dist

OFFER, GO, MISSING = "lhcp/offer", "lhcp/go", "lhcp/missing"
FAREWELL = 2.0
"""Seconds for which rank 0, which may keep the store, lets the others read who is missing."""


class RanksMissing(RuntimeError):
    """Ranks of the run did not come within the time; the message names them."""


def meet(rank: int, world_size: int, timeout: float) -> dist.Store:
    """Return a store that the ranks of this attempt share, when all of them are there.

    Raises:
        RanksMissing: some did not come within `timeout` seconds.
    """
    deadline = monotonic() + timeout
    store = open_store(rank, world_size, timeout)
    if rank == 0:
        word = gather_answers(store, world_size, deadline, timeout)
    else:
        word = answer(store, rank, world_size, deadline, timeout)
    store.set_timeout(timedelta(seconds=timeout))
    return dist.PrefixStore(f"lhcp/{word}", store)


def open_store(rank: int, world_size: int, timeout: float) -> dist.Store:
    """Return the store at MASTER_ADDR, which rank 0 opens where torchrun's agent does not.

    Raises:
        RanksMissing: nobody answers there.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    keeps = rank == 0 and not of_agent
    try:
        return dist.TCPStore(
            host,
            port,
            is_master=keeps,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=listen_at(host, port) if keeps else None,
        )
    except RuntimeError as error:
        who = "torchrun" if of_agent else "rank 0"
        if keeps:
            raise
        raise RanksMissing(
            f"rank {rank} of {world_size} came, and {who} did not answer at {host}:{port} within "
            f"{timeout:g} s: see whether it is running, and reachable from this machine"
        ) from error


def listen_at(host: str, port: int) -> int | None:
    """Return a socket that listens at this address alone: torch's own does on all interfaces.

    None where the address is not this machine's, as of a gateway before it: then torch listens.

    Raises:
        OSError: the port is taken, or the name says nothing.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    try:
        return socket.create_server((host, address[1]), family=family).detach()
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            return None
        raise


def stay_on_this_machine() -> None:
    """Let gloo's messages stay on the loopback interface where ranks meet on it.

    Gloo takes the interface from the environment alone; what the user set there stays.
    """
    host = os.environ["MASTER_ADDR"]
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if names and all(ip_address(address[0]).is_loopback for *_, address in found):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])


def gather_answers(store: dist.Store, world_size: int, deadline: float, timeout: float) -> str:
    """Offer a new word, wait for all ranks' answers to it, list them; return the word.

    Raises:
        RanksMissing: an answer did not come.
    """
    word = secrets.token_hex(8)
    store.set(OFFER, word)
    answers: dict[int, str] = {0: word}
    while len(answers) < world_size:
        for rank in set(range(1, world_size)) - answers.keys():
            if store.check([key := f"lhcp/answer/{rank}"]):
                said, own = store.get(key).decode().split()
                if said == word:
                    answers[rank] = own
        if len(answers) < world_size:
            if monotonic() > deadline:
                missing = sorted(set(range(world_size)) - answers.keys())
                said = absent(missing, world_size, timeout)
                store.set(MISSING, f"{word} {said}")
                sleep(FAREWELL)
                raise RanksMissing(said)
            pause(world_size)
    store.set(GO, json.dumps(list(answers.values())))
    return word


def answer(store: dist.Store, rank: int, world_size: int, deadline: float, timeout: float) -> str:
    """Answer rank 0's offer until it lists this rank's answer; return the word.

    Raises:
        RanksMissing: it did not.
    """
    own, offered = secrets.token_hex(8), ""
    while monotonic() < deadline + FAREWELL:
        try:
            now = store.get(OFFER).decode() if store.check([OFFER]) else ""
            if now != offered:
                # The offer before it may have been an earlier attempt's.
                offered = now
                store.set(f"lhcp/answer/{rank}", f"{offered} {own}")
            if store.check([GO]) and own in json.loads(store.get(GO)):
                return offered
            if store.check([MISSING]):
                word, said = store.get(MISSING).decode().split(maxsplit=1)
                if word == offered:
                    raise RanksMissing(said)
        except dist.DistNetworkError as error:
            raise RanksMissing(f"rank {rank} of {world_size}: rank 0 is gone: {error}") from error
        pause(world_size)
    raise RanksMissing(
        f"rank {rank} of {world_size} joined, rank 0 missing after {timeout:g} s: see whether it "
        "was started, and what its log says; --timeout gives it longer"
    )


def pause(world_size: int) -> None:
    """Wait between two looks at the store, which serves all ranks: with many of them longer."""
    sleep(max(0.05, world_size / 2000))


def absent(missing: list[int], world_size: int, timeout: float) -> str:
    """Say who is missing."""
    ranks = "rank" if len(missing) == 1 else "ranks"
    return (
        f"{world_size - len(missing)} of {world_size} joined, {ranks} "
        f"{', '.join(map(str, missing))} missing after {timeout:g} s: see what was started where, "
        "and what its log says; --timeout gives them longer"
    )
