"""Do all ranks mean the same call? Asked before the first messages of a call that is new.

Ranks that differ would read one another's messages as what they are not. So each rank posts what it
was asked for to the store of its group, field by field, and reads what the others posted: once for
each new kind of call, without a collective, so that it needs no GPU and nothing is in flight.
"""

import json
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch.distributed as dist

from lhcp.comm.mesh import Ranks
from lhcp.comm.torch_private import is_fake, store_of

T = TypeVar("T")

Fields = dict[str, str]
"""What must be equal on all ranks, by name."""

REFUSALS = (TypeError, ValueError, ImportError)
"""What a rank raises where it was asked for something that it cannot do."""


@dataclass(frozen=True)
class Calls:
    """What a rank has called so far in one group: where ranks differ in it, one is astray."""

    count: int = 0
    trail: int = 0
    """A number below 2**20 that depends on all of them, in their order."""
    last: Fields = field(default_factory=dict)
    """What the last one asked for."""

    def and_then(self, number: int, fields: Fields) -> "Calls":
        """Return these calls and one more."""
        return Calls(self.count + 1, (self.trail * 31 + number) & 0xFFFFF, fields)

    def and_given(self, number: int, fields: Fields) -> "Calls":
        """Return these calls and what one was given, as a number of 64 bits that depends on it."""
        # Other bits at each call: all layers are given the same, and in a sum of as many powers of
        # 31 as there are layers most bits of one number cancel.
        return self.and_then(number >> self.count % 32, fields)

    def since(self, before: "Calls") -> int:
        """Return a number below 2**20 that depends on the calls after those, in their order."""
        made = self.count - before.count
        return (self.trail - before.trail * pow(31, made, 1 << 20) + made) & 0xFFFFF


@dataclass
class _Asked:
    """What this rank has asked its group so far."""

    known: dict[Hashable, tuple[int, Fields]] = field(default_factory=dict)
    """Calls that all ranks agreed on: as which of them, and what they ask for."""
    posts: int = 0
    calls: Calls = field(default_factory=Calls)
    given: Calls = field(default_factory=Calls)
    """Of these, what was given anew: see `note_given`."""
    asking: Fields | None = None
    """What is being compared now."""
    counted: bool = True
    """Whether every call is; a CUDA graph's is not."""


_ASKED: WeakKeyDictionary[dist.ProcessGroup, _Asked] = WeakKeyDictionary()
"""Of each group that is alive: what was agreed ends with the ranks that agreed."""


def agreed(
    ranks: Ranks,
    key: Hashable,
    prepare: Callable[[], T],
    fields: Callable[[T | None], Fields],
    counted: bool = True,
) -> T:
    """Return what `prepare` returns, when all ranks were asked for the same.

    Every rank of the group calls it, in the same order. A key that was agreed on costs a look-up.

    Args:
        key: the call; equal where what it asks for is.
        prepare: checks and plans, without a message.
        fields: the call in words, with what was prepared, or None where that failed.
        counted: whether it is a call that sends, of which every rank makes as many.

    Raises:
        TypeError, ValueError, ImportError: from `prepare`; or ValueError, as `compare`.
    """
    if ranks.flat is None or ranks.world_size == 1:
        return prepare()
    asked = _ASKED.setdefault(ranks.flat, _Asked())
    if (call := asked.known.get(key)) is not None:
        prepared = prepare()
    else:
        prepared = compared(ranks, prepare, fields)
        asked.known[key] = call = len(asked.known) + 1, fields(prepared)
    if counted:
        asked.calls = asked.calls.and_then(*call)
    return prepared


def note_given(ranks: Ranks, number: int, fields: Fields) -> None:
    """Count what every call may be given anew, such as documents, without a comparison.

    Where a rank was given something else, its trail is another from here on: a step's check finds
    it, and a watchdog names it. Nothing hides it: a graph's calls read it outside of the graph.

    Args:
        number: of 64 bits that depend on what was given. fields: the same in words.
    """
    if ranks.flat is None or ranks.world_size == 1:
        return
    asked = _ASKED.setdefault(ranks.flat, _Asked())
    asked.calls = asked.calls.and_given(number, asked.calls.last)
    asked.given = asked.given.and_given(number, fields)


def agree_on_sizes(ranks: Ranks, sizes: Hashable, said: Callable[[], Fields]) -> None:
    """Compare sizes with the other ranks, at the first call with them.

    For what a graph of torch.compile runs, which may be traced for sizes that nobody knows then.

    Raises:
        ValueError: as `compare`.
    """
    agreed(ranks, sizes, lambda: None, lambda _: said())


def leave_uncounted(ranks: Ranks) -> None:
    """Note that calls of these ranks may be a graph's, which nobody counts but for `note_given`."""
    if ranks.flat is not None:
        _ASKED.setdefault(ranks.flat, _Asked()).counted = False


def calls_in(group: dist.ProcessGroup | None) -> Calls:
    """Return what this rank has called so far in a group, and was given last.

    Where calls may be a CUDA graph's, only what was given.
    """
    asked = _Asked() if group is None else _ASKED.get(group, _Asked())
    if not asked.counted:
        return asked.given
    if (asking := asked.asking) is not None:
        return Calls(asked.calls.count + 1, 0, asking)
    return replace(asked.calls, last=asked.given.last | asked.calls.last)


def calls_made() -> Calls:
    """Return as `calls_in` what this process has called in the group in which it called most.

    Any thread may ask: it is how a watchdog sees where the attention is.
    """
    groups = [group for ref in _ASKED.keyrefs() if (group := ref()) is not None]
    return max(map(calls_in, groups), key=lambda one: one.count, default=Calls())


def compared(ranks: Ranks, prepare: Callable[[], T], fields: Callable[[T | None], Fields]) -> T:
    """Do what `agreed` does at a call that is new, at every call.

    Raises:
        TypeError, ValueError, ImportError: as `agreed`.
    """
    try:
        prepared = prepare()
    except REFUSALS as problem:
        compare(ranks, fields(None), problem)
        raise
    compare(ranks, fields(prepared))
    return prepared


def compare(ranks: Ranks, fields: Fields, problem: Exception | None = None) -> None:
    """Compare with the other ranks what this one was asked for; all of them call it.

    A rank with a problem posts that and returns at once, to raise it.

    Raises:
        ValueError: another rank has a problem, or was asked for something else; the message names
            the rank and the fields. Or a rank did not come within the timeout of the store.
    """
    if ranks.flat is None or ranks.world_size == 1 or is_fake(ranks.flat):
        return
    trouble = None if problem is None else f"{type(problem).__name__}: {problem}"
    number = _post(ranks, fields, trouble)
    if problem is not None:
        return
    posts = _read(ranks, number)
    for rank, (_, other) in enumerate(posts):
        if other is not None:
            raise ValueError(f"rank {rank} of {ranks.world_size} cannot go on: {other}")
    first, _ = posts[0]
    differ = [rank for rank, (other, _) in enumerate(posts) if other != first]
    if differ:
        theirs, _ = posts[differ[0]]
        names = [name for name in {**first, **theirs} if first.get(name) != theirs.get(name)]
        said = "; ".join(
            f"{name}: {first.get(name, 'none')} on rank 0, {theirs.get(name, 'none')} on rank "
            f"{differ[0]}"
            for name in names
        )
        raise ValueError(
            f"ranks were asked for different things: {said}. Ranks that differ from rank 0: "
            f"{differ} of {ranks.world_size}; every rank must call with equal shapes and choices"
        )


def told(ranks: Ranks, name: str, said: str) -> list[str]:
    """Return what each rank says of `name`; all of them call it.

    Raises:
        ValueError: as `compare`, of a rank that says something of something else.
    """
    if ranks.flat is None or ranks.world_size == 1 or is_fake(ranks.flat):
        return [said]
    posts = _read(ranks, _post(ranks, {name: said}))
    for rank, (fields, _) in enumerate(posts):
        if name not in fields:
            raise ValueError(
                f"rank {ranks.rank} of {ranks.world_size} says {name}: {said}, and rank {rank} is "
                f"at another call: {fields}; every rank must make the same calls in the same order"
            )
    return [fields[name] for fields, _ in posts]


def _post(ranks: Ranks, fields: Fields, trouble: str | None = None) -> int:
    """Post what this rank says and return the number of the post."""
    assert ranks.flat is not None
    asked = _ASKED.setdefault(ranks.flat, _Asked())
    asked.posts += 1
    asked.asking = fields if trouble is None else None
    key = _key(asked.posts, ranks.rank)
    store_of(ranks.flat).set(key, json.dumps([fields, trouble]))
    return asked.posts


def _key(number: int, rank: int) -> str:
    return f"lhcp/{number}/{rank}"


def _read(ranks: Ranks, number: int) -> list[tuple[Fields, str | None]]:
    """Return what each rank posted as its post of this number; waits for them."""
    assert ranks.flat is not None
    store = store_of(ranks.flat)
    keys = [_key(number, rank) for rank in range(ranks.world_size)]
    try:
        store.wait(keys)
    except RuntimeError as error:
        late = [rank for rank, key in enumerate(keys) if not store.check([key])]
        raise ValueError(
            f"ranks {late} of {ranks.world_size} did not make this call within the timeout of the "
            f"group's store ({error}): every rank must make the same calls in the same order"
        ) from error
    posts = [json.loads(store.get(key)) for key in keys]
    _ASKED[ranks.flat].asking = None
    # All have posted this one, so all have read the last.
    if number > 1:
        store.delete_key(_key(number - 1, ranks.rank))
    return posts
