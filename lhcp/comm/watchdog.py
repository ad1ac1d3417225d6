"""`Watchdog`: when ranks wait for one that does not come, all of them say for whom, and end.

Each rank posts where it is to the store of its group, from a thread; a rank that has waited for too
long reads what the others posted. No message, no collective and nothing of the device takes part:
on gloo a wait may end in an error of a connection, on NCCL the host goes on and the device waits.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable
from threading import Event, Thread, main_thread
from types import TracebackType
from weakref import WeakKeyDictionary

import torch.distributed as dist

from lhcp.comm.marks import Marks
from lhcp.comm.posts import MISSED, Members, Posts, Timing
from lhcp.comm.torch_private import copy_of, is_fake, store_of
from lhcp.comm.trail import calls_made
from lhcp.comm.whereabouts import End, Whereabouts, excused, guilty, in_words

STATUS = 124
"""Exit status of a process that its watchdog ends, as `timeout` has it."""
ORPHANED = 10.0
"""Seconds for which a process goes on without its store."""

_OPENED: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()
"""Watchdogs that this process had for a group: each has its own words in the store."""


class RanksLost(RuntimeError):
    """A message failed because another rank is gone; it says which, and where it was last heard."""


def end_process(said: str) -> None:
    """Write what happened, and where this rank's main thread stands, and end the process.

    The main thread may be in a call that waits for a device, from which no exception gets it out.
    """
    print(f"\n{said}\n{main_thread_stack()}", file=sys.stderr, flush=True)
    os._exit(STATUS)


def main_thread_stack() -> str:
    """Return the innermost calls of this process's main thread."""
    frame = sys._current_frames().get(main_thread().ident or 0)
    calls = traceback.extract_stack(frame, limit=None)[-8:]
    return "its main thread: " + " > ".join(
        f"{os.path.basename(call.filename)}:{call.lineno} {call.name}" for call in calls
    )


class Watchdog(Marks):
    """Watches the ranks of a group; enter it on all of them, after init_process_group.

        with lhcp.Watchdog(timeout=120) as watchdog:
            for step in range(steps):
                watchdog.at("forward", step)
                loss = ...
                watchdog.at("backward", step)
                ...

    A rank that stays at a mark longer than the timeout, without an attention call too, and that
    waits for no rank which is rightly busy before it, reads where all were last heard: whose
    process is gone or frozen, who is alive and does not move, who is done, whose attention calls
    are others. All ranks say it, then end with status 124, so that a launcher can start them again.
    An error of a message, which on gloo comes at once when a rank dies, becomes a `RanksLost` that
    says so.
    Time in which this process itself was stopped does not count. Where nobody makes marks, only
    ranks that are gone, frozen or done are seen, and how far attention is.

    The store must answer until the block is left; ten seconds after it is lost (as an orphan's,
    whose launcher died) the process ends. With one rank there is nothing to watch.

    Args:
        group: whose ranks; None: all of the process group; `Members` before there is one.
        timeout: seconds at a mark. The group's own timeout should be longer: it is what is left
            when this one fails.
        on_stall: called in a thread with what is to be said; it may end the process in another way.
        beat: seconds between posts; None: a half, less of a short timeout, more with many ranks.

    Raises:
        ValueError: the timeout is no positive number.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | Members | None = None,
        timeout: float = 120.0,
        *,
        on_stall: Callable[[str], None] = end_process,
        beat: float | None = None,
    ) -> None:
        if not 0 < timeout < float("inf"):
            raise ValueError(f"timeout={timeout}: must be a positive number of seconds, as 120")
        super().__init__(timeout)
        self._on_stall = on_stall
        self._group = group
        self._beat = beat
        self._mind: _Mind | None = None

    def __enter__(self) -> "Watchdog":
        members = self._members()
        if members is not None:
            timing = Timing.of(self.timeout, members.size, self._beat)
            self._mind = _Mind(self, Posts(members, timing), self._on_stall)
        return self

    def _members(self) -> Members | None:
        """Return whom to watch, by words of their own in the store; None: there is nobody."""
        group = dist.group.WORLD if self._group is None else self._group
        if isinstance(group, Members):
            name, store, rank, size = "members", *group
        elif group is None or is_fake(group):
            return None
        else:
            name = str(number := _OPENED.get(group, 0) + 1)
            _OPENED[group] = number
            store, rank, size = store_of(group), group.rank(), group.size()
        if size == 1:
            return None
        # Its own connection: the main thread may be waiting in the other.
        return Members(dist.PrefixStore(f"lhcp/watchdog/{name}", copy_of(store)), rank, size)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        mind, self._mind = self._mind, None
        if mind is None:
            return
        if error is None:
            mind.close("left", "")
            return
        # Errors of messages, and of what a device was doing, are RuntimeErrors.
        of_message = isinstance(error, RuntimeError)
        said = f"{type(error).__name__}: {str(error).strip()[:400]}"
        mind.quiet()
        mind.posts.last_word(self.place, "cut off" if of_message else "failed", said)
        heard = mind.posts.explained() if of_message else []
        mind.close("", "")
        if mind.posts.lost:
            raise RanksLost(mind.posts.without_store()) from error
        if guilty(heard):
            raise RanksLost(in_words(heard)) from error
        if any(one.where is None or one.where.said != said for one in heard):
            error.add_note(f"where ranks were: {in_words(heard)}")


class _Mind:
    """The two threads of a watchdog: one that talks to the store, and one that decides.

    The first may have to wait for a store whose keeper is frozen; the second never waits.
    """

    def __init__(self, marks: Marks, posts: Posts, on_stall: Callable[[str], None]) -> None:
        self.marks, self.posts, self._on_stall = marks, posts, on_stall
        self._closing, self._quiet, self._saying = Event(), Event(), Event()
        self._moved_at, self._seen = 0.0, (-1, -1)
        self._threads = [
            Thread(target=loop, name=f"lhcp-watchdog-{loop.__name__}", daemon=True)
            for loop in (self._talk, self._decide)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def _still(self) -> float:
        """Seconds since this rank made a mark or a call."""
        return self.posts.clock.now - self._moved_at

    @property
    def _grace(self) -> float:
        """Seconds in which a rank that is well must have moved, or been heard."""
        return (MISSED + 1) * self.posts.beat

    def quiet(self) -> None:
        """Decide nothing from now on: the main thread does, unless all is being said already."""
        self._quiet.set()
        if self._saying.is_set():
            self._threads[1].join()

    def close(self, end: End, said: str) -> None:
        """Stop both threads, after a last word where `end` has one."""
        self._quiet.set()
        self._closing.set()
        for thread in self._threads:
            thread.join(2 * self.posts.beat + 1)
        if end and not self._threads[0].is_alive() and not self.posts.lost:
            self.posts.last_word(self.marks.place, end, said)

    def _talk(self) -> None:
        posts = self.posts
        while not self._closing.is_set() and not posts.lost:
            own = Whereabouts.of(self.marks.place, calls_made(), self._still)
            posts.post(own, look=self._still > posts.beat)
            self._closing.wait(posts.beat)

    def _decide(self) -> None:
        posts = self.posts
        lost_at = None
        while not self._closing.wait(posts.beat / 2):
            now = posts.clock.tick()
            seen = (self.marks.place.number, calls_made().count)
            if seen != self._seen:
                self._seen, self._moved_at = seen, now
            if posts.lost and lost_at is None:
                lost_at = now
            ends = self._must_end() or (lost_at is not None and now - lost_at > ORPHANED)
            if ends and not self._quiet.is_set():
                self._saying.set()
                self._say()
                return

    def _must_end(self) -> bool:
        """Whether this rank has waited in vain."""
        posts, marks = self.posts, self.marks
        others = [one for one in posts.heard() if one.rank != posts.rank]
        if self._still > self._grace and posts.anybody_ended:
            return True
        if marks.place.number == 0:
            # Nobody says how far it is: a rank that was heard and is silent is all that shows.
            silent = [one.silent for one in others if one.where is not None and not one.where.end]
            return self._still > self._grace and max(silent, default=0) > marks.timeout
        return self._still > marks.place.limit and not excused(marks.place, others, marks.timeout)

    def _say(self) -> None:
        """Say where all ranks are, when each has had the time to say its last word."""
        posts, place = self.posts, self.marks.place
        rank = f"rank {posts.rank} of {posts.size}"
        waits = f"{self._still:.0f} s in {place}"
        if posts.lost or posts.clock.now - posts.answered > posts.silence:
            self._on_stall(f"{rank} ends: {posts.without_store()}; {waits}")
            return
        posts.last_word(place, "stalled", "")
        # An exit breaks the messages of others: nobody ends before all that live have said theirs,
        # and heard this one's. And a launcher ends the others when one is gone.
        self._wait(max(self._grace + 2 * posts.beat, 3.0), lambda: posts.all_ended)
        self._wait(max(posts.beat, 0.3))
        heard = posts.heard()
        self._on_stall(f"{rank} ends, after {waits}: {in_words(heard)}")

    def _wait(self, seconds: float, enough: Callable[[], bool] = lambda: False) -> None:
        """Let time go by, in which the other thread posts and reads; until it is enough."""
        until = self.posts.clock.now + seconds
        while self.posts.clock.tick() < until and not enough():
            time.sleep(self.posts.beat / 4)
