"""What a watchdog's thread posts to the store of its group, and what it hears of the others."""

import time
from dataclasses import dataclass, replace
from threading import Lock
from typing import NamedTuple

import torch.distributed as dist

from lhcp.comm.trail import calls_made
from lhcp.comm.whereabouts import End, Heard, Place, Whereabouts

MISSED = 4
"""Beats that a rank must miss at least, to be taken for stopped or gone."""


class Members(NamedTuple):
    """Ranks that share a store, whether they are a group yet or not."""

    store: dist.Store
    rank: int
    """This one's."""
    size: int


class Timing(NamedTuple):
    """How often ranks post."""

    beat: float
    """Seconds between two posts."""
    silence: float
    """Seconds without a post after which a rank is taken for stopped or gone."""

    @classmethod
    def of(cls, timeout: float, size: int, beat: float | None) -> "Timing":
        """Return what fits a timeout and so many ranks, whose posts one store serves."""
        beat = beat or min(timeout / 20, max(0.5, size / 128))
        # A busy host may keep the thread of a healthy rank from its beat for a while.
        return cls(beat, max(MISSED * beat, min(3.0, 0.75 * timeout)))


class Clock:
    """Seconds that passed while this process ran: what it was stopped for does not count."""

    def __init__(self, most: float) -> None:
        self.now, self._most, self._last = 0.0, most, time.monotonic()

    def tick(self) -> float:
        """Return the time; called again and again, after at most `most` seconds of running."""
        last, self._last = self._last, time.monotonic()
        self.now += min(self._last - last, self._most)
        return self.now


@dataclass
class Peer:
    """What was last heard of a rank."""

    text: bytes = b""
    where: Whereabouts | None = None
    since: float = 0.0
    """When that was new."""


class Posts:
    """What ranks post, and what this one heard of the others: all that talks to the store."""

    def __init__(self, members: Members, timing: Timing) -> None:
        self.rank, self.size, self.beat = members.rank, members.size, timing.beat
        self.silence = timing.silence
        self.clock = Clock(3 * timing.beat)
        self.answered = 0.0
        """When the store last answered."""
        self.lost = ""
        """Why it answers no more."""
        self._store = members.store
        self._own = Whereabouts()
        self._peers = [Peer() for _ in range(self.size)]
        # A last word comes from another thread.
        self._lock = Lock()

    def without_store(self) -> str:
        """Say that the store is gone, and whose fault it may be."""
        why = self.lost or f"it has not answered for {self.clock.now - self.answered:.0f} s"
        return (
            f"the store through which ranks find one another is gone ({why}): whoever keeps it, "
            "torchrun's agent or rank 0, has died or is frozen"
        )

    def post(self, own: Whereabouts, look: bool) -> None:
        """Post where this rank is; with `look` read where the others are."""
        # The other thread may wait for a store that is frozen.
        if not self._lock.acquire(timeout=self.silence):
            return
        try:
            if self._own.end:
                own = self._own
            self._own = own = replace(own, beat=self._own.beat + 1)
            self._store.set(str(self.rank), own.to_json())
            if look:
                self._look()
            self.answered = self.clock.now
        except RuntimeError as error:
            # Of torch's stores every error is one. Its first line says what; the rest is C++.
            self.lost = str(error).strip().splitlines()[0]
        finally:
            self._lock.release()

    def _look(self) -> None:
        names = [str(rank) for rank in range(self.size)]
        known = [name for name in names if self._peers[int(name)].text or self._store.check([name])]
        for name, text in zip(known, self._store.multi_get(known), strict=True):
            peer = self._peers[int(name)]
            if text != peer.text:
                peer.text, peer.since = text, self.clock.now
                peer.where = Whereabouts.from_json(text)

    def last_word(self, place: Place, end: End, said: str) -> None:
        """Post how this rank ended; later posts repeat it."""
        calls = calls_made()
        own = Whereabouts.of(place, calls, self._own.still)
        self.post(replace(own, end=end, said=said, asked=calls.last), look=False)

    def heard(self) -> list[Heard]:
        """Return what is known of all ranks, of this one itself."""
        found = []
        for rank, peer in enumerate(self._peers):
            silent = self.clock.now - peer.since
            own = rank == self.rank
            where = self._own if own else peer.where
            gone = not own and silent > self.silence
            found.append(Heard(rank, where, 0.0 if own else silent, gone))
        return found

    def explained(self) -> list[Heard]:
        """Read posts until each rank ended, posted anew or was silent for long; return them."""
        begin = self.clock.tick()
        enough = self.silence + 2 * self.beat
        self.post(self._own, look=True)
        before = [peer.text for peer in self._peers]
        while not self.lost and self.clock.now - begin < enough:
            time.sleep(self.beat / 2)
            self.clock.tick()
            self.post(self._own, look=True)
            pairs = zip(self._peers, before, strict=True)
            if all((p.where and p.where.end) or p.text != old for p, old in pairs):
                break
        return self.heard()

    @property
    def anybody_ended(self) -> bool:
        """Whether another rank has said its last word."""
        return any(
            rank != self.rank and peer.where is not None and peer.where.end not in ("", "left")
            for rank, peer in enumerate(self._peers)
        )

    @property
    def all_ended(self) -> bool:
        """Whether every other rank has said its last word, or cannot any more."""
        others = [one for one in self.heard() if one.rank != self.rank]
        return all(one.gone or (one.where is not None and one.where.end) for one in others)
