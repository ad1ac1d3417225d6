"""Where each rank was last heard, and what that says: pure, so that it is tested without ranks."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from lhcp.comm.trail import Calls, Fields

End = Literal["", "left", "failed", "cut off", "stalled"]
"""How a rank ended: it did not; it was done; an error of its own; an error of a message, as when
another rank dies; its watchdog gave up."""


@dataclass(frozen=True)
class Place:
    """The last mark that a rank made."""

    number: int = 0
    """Marks made so far; every rank makes the same ones in the same order."""
    phase: str = "start"
    step: int | None = None
    limit: float = float("inf")
    """Seconds that it may stay there."""

    def __str__(self) -> str:
        return self.phase if self.step is None else f"step {self.step}, {self.phase}"


@dataclass(frozen=True)
class Whereabouts:
    """What a rank posts of itself, again and again."""

    place: Place = field(default_factory=Place)
    calls: int = 0
    """Attention calls made so far."""
    trail: int = 0
    """As of `lhcp.comm.trail.Calls`."""
    beat: int = 0
    """Of each post another: a rank that posts the same one has stopped."""
    still: float = 0.0
    """Seconds since it made a mark or a call."""
    end: End = ""
    said: str = ""
    """The error that ended it."""
    asked: Fields = field(default_factory=dict)
    """What its last call asked for; of a rank that has ended."""
    group: int = -1
    """Of its calls, as of `Calls`."""

    @classmethod
    def of(cls, place: Place, calls: Calls, still: float) -> "Whereabouts":
        """Return those of a rank that made these calls, without what the last one asked for."""
        return cls(place, calls.count, calls.trail, still=still, group=calls.group)

    @property
    def made(self) -> Calls:
        """Its calls so far."""
        return Calls(self.calls, self.trail, self.asked, self.group)

    def to_json(self) -> str:
        """Return it as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Whereabouts":
        """Return what `to_json` wrote."""
        found = json.loads(text)
        return cls(**{**found, "place": Place(**found["place"])})


@dataclass(frozen=True)
class Heard:
    """What one rank knows of a rank; of itself too."""

    rank: int
    where: Whereabouts | None
    """None: it never posted."""
    silent: float
    """Seconds since it posted something new."""
    gone: bool
    """Whether that is so long that it has stopped, or died."""


def excused(own: Place, others: Iterable[Heard], patience: float) -> bool:
    """Tell whether a rank waits for one that is rightly somewhere before it, and within its limit.

    One that is silent is believed to be so for `patience` seconds.
    """
    return any(
        one.where is not None
        and not one.where.end
        and one.where.place.number < own.number
        and one.silent < patience
        and one.where.still + one.silent < one.where.place.limit
        for one in others
    )


def in_words(heard: Sequence[Heard]) -> str:
    """Say who holds the others up, and where all of them are."""
    said: list[str] = []
    rest: list[tuple[int, Whereabouts]] = []
    for one in heard:
        if one.where is None:
            said.append(f"rank {one.rank} was never heard of")
        elif one.where.end == "failed":
            said.append(f"rank {one.rank} ended in {one.where.place}: {one.where.said}")
        elif one.where.end == "left":
            said.append(f"rank {one.rank} was done after {one.where.place}, and left")
        elif one.gone and one.where.end != "cut off":
            what = f"was last heard in {one.where.place}, {one.silent:.0f} s ago"
            said.append(f"rank {one.rank} {what}: it has stopped, or its process is gone")
        else:
            rest.append((one.rank, one.where))
    said += _astray(rest, blamed=bool(said))
    return "; ".join(said)


def guilty(heard: Sequence[Heard]) -> bool:
    """Tell whether some rank is gone or done, so that the others wait in vain."""
    return any(
        one.where is None
        or one.where.end in ("failed", "left")
        or (one.gone and one.where.end != "cut off")
        for one in heard
    )


def _astray(rest: list[tuple[int, Whereabouts]], blamed: bool) -> list[str]:
    """Say where ranks are that are alive: those behind the others, then those that wait."""
    if not rest:
        return []
    said: list[str] = []
    first = min(where.place.number for _, where in rest)
    behind = [(rank, where) for rank, where in rest if where.place.number == first]
    if not blamed and len(behind) < len(rest):
        still = max(where.still for _, where in behind)
        alive = "is alive and has" if len(behind) == 1 else "are alive and have"
        names = ranks_in_words([rank for rank, _ in behind])
        said.append(f"{names} {alive} not moved from {behind[0][1].place} for {still:.0f} s")
        rest = [(rank, where) for rank, where in rest if where.place.number != first]
    for place in dict.fromkeys(str(where.place) for _, where in rest):
        there = [rank for rank, where in rest if str(where.place) == place]
        said.append(f"{ranks_in_words(there)} {'wait' if len(there) > 1 else 'waits'} in {place}")
    living = dict([*behind, *rest])
    if differ := calls_in_words({r: w.made for r, w in living.items()}):
        said.append(differ)
    if not blamed:
        for error in dict.fromkeys(where.said for _, where in rest if where.said):
            there = [rank for rank, where in rest if where.said == error]
            said.append(f"{ranks_in_words(there)} failed with {error}")
    return said


def calls_in_words(calls: Mapping[int, Calls]) -> str:
    """Say at which attention call ranks are where those or what they asked for differ, else "".

    Ranks of several groups are compared within each: others may be given other documents.
    """
    groups = {one.group for one in calls.values() if one.count}
    if len(groups) < 2:
        rows = _differ(calls)
    else:
        each = ({r: one for r, one in calls.items() if one.group == g} for g in sorted(groups))
        rows = [row for of_group in each for row in _differ(of_group)]
    return f"the ranks' attention calls differ: {', '.join(rows)}" if rows else ""


def _differ(calls: Mapping[int, Calls]) -> list[str]:
    rows: dict[tuple[int, int], list[int]] = {}
    for rank in sorted(calls):
        rows.setdefault((calls[rank].count, calls[rank].trail), []).append(rank)
    if len(rows) < 2:
        return []
    asked = [one.last for one in calls.values() if one.last]
    names = dict.fromkeys(name for fields in asked for name in fields)
    differ = [name for name in names if len({fields.get(name) for fields in asked}) > 1]
    said = []
    for (count, _), ranks in rows.items():
        fields = calls[ranks[0]].last
        what = ", ".join(f"{name}: {fields.get(name, 'none')}" for name in differ if fields)
        verb = "is" if len(ranks) == 1 else "are"
        where = f"{ranks_in_words(ranks)} {verb} at attention call {count}"
        said.append(f"{where} ({what})" if what else where)
    return said


def ranks_in_words(ranks: Sequence[int]) -> str:
    """Return "rank 1", "ranks 0 and 2", "ranks 0, 2 and 3", or of many "ranks 0-6 and 8-63"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    names = []
    for run in runs:
        names += [f"{run[0]}-{run[-1]}"] if len(run) > 3 else [str(rank) for rank in run]
    if len(ranks) == 1:
        return f"rank {names[0]}"
    return "ranks " + (names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}")
