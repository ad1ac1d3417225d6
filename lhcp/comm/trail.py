"""What this rank has called so far in each group, as a number that all ranks share: its trail."""

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import torch.distributed as dist

from lhcp.comm.mesh import Ranks

Fields = dict[str, str]
"""What must be equal on all ranks, by name."""


@dataclass(frozen=True)
class Calls:
    """What a rank has called so far in one group: where ranks differ in it, one is astray."""

    count: int = 0
    trail: int = 0
    """A number below 2**20 that depends on all of them, in their order."""
    last: Fields = field(default_factory=dict)
    """What the last one asked for."""
    group: int = -1
    """The lowest rank of all that is in it: other groups are given other documents."""

    def and_then(self, number: int, fields: Fields) -> "Calls":
        """Return these calls and one more."""
        return Calls(self.count + 1, (self.trail * 31 + number) & 0xFFFFF, fields, self.group)

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
class Asked:
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
    layers: dict[object, int] = field(default_factory=dict)
    """Of calls that are compared each time: whose, in the order of their first."""

    def learn(self, key: Hashable, fields: Fields) -> tuple[int, Fields]:
        """Note that all ranks agreed on a call; return as which of them, and what it asks for."""
        return self.known.setdefault(key, (len(self.known) + 1, fields))

    def turn(self, layer: object) -> Fields:
        """Return which call the next is, by a layer or by a function, None."""
        number = self.layers.get(layer, len(self.layers) + 1)
        turn = {} if layer is None else {"layer, in the order of first calls": str(number)}
        if self.counted:
            turn["call"] = str(self.calls.count + 1)
            turn["trail of the calls before"] = str(self.calls.trail)
        return turn


_ASKED: WeakKeyDictionary[dist.ProcessGroup, Asked] = WeakKeyDictionary()
"""Of each group that is alive: what was agreed ends with the ranks that agreed."""


def asked_of(group: dist.ProcessGroup) -> Asked:
    """Return what this rank has asked a group so far, to be added to."""
    if group not in _ASKED:
        none = Calls(group=min(dist.get_process_group_ranks(group)))
        _ASKED[group] = Asked(calls=none, given=none)
    return _ASKED[group]


def note_given(ranks: Ranks, number: int, fields: Fields) -> None:
    """Count what every call may be given anew, such as documents, without a comparison.

    Where a rank was given something else, its trail is another from here on: a step's check finds
    it, and a watchdog names it. Nothing hides it: a graph's calls read it outside of the graph.

    Args:
        number: of 64 bits that depend on what was given. fields: the same in words.
    """
    if ranks.flat is None or ranks.world_size == 1:
        return
    asked = asked_of(ranks.flat)
    asked.calls = asked.calls.and_given(number, asked.calls.last)
    asked.given = asked.given.and_given(number, fields)


def leave_uncounted(ranks: Ranks) -> None:
    """Note that calls of these ranks may be a graph's, which nobody counts but for `note_given`."""
    if ranks.flat is not None:
        asked_of(ranks.flat).counted = False


def calls_in(group: dist.ProcessGroup | None) -> Calls:
    """Return what this rank has called so far in a group, and was given last.

    Where calls may be a CUDA graph's, only what was given.
    """
    asked = Asked() if group is None else _ASKED.get(group, Asked())
    if not asked.counted:
        return asked.given
    if (asking := asked.asking) is not None:
        return replace(asked.calls, count=asked.calls.count + 1, trail=0, last=asking)
    return replace(asked.calls, last=asked.given.last | asked.calls.last)


def calls_made() -> Calls:
    """Return as `calls_in` what this process has called in the group in which it called most.

    Any thread may ask: it is how a watchdog sees where the attention is.
    """
    groups = [group for ref in _ASKED.keyrefs() if (group := ref()) is not None]
    return max(map(calls_in, groups), key=lambda one: one.count, default=Calls())
