"""What happens to a run: ranks killed and frozen, a node's cable pulled, a checkpoint torn."""

import os
import random
import signal
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from bench.rotation.namespaces import Nodes
from tests.evidence.agents import Agents

CUT = (1.0, 30.0)
"""Seconds for which a cable is out: some less than the run's timeout, some more."""


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, oldest first."""
    return sorted(folder.glob("step-" + "[0-9]" * 8))


def held_by(pid: int) -> tuple[float, int]:
    """Return the resident megabytes and the open files of a process; zeros where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        size = next((int(x.split()[1]) / 1024 for x in lines if x.startswith("VmRSS")), 0.0)
        return size, len(os.listdir(f"/proc/{pid}/fd"))
    except FileNotFoundError:
        return 0.0, 0


@dataclass
class Struck:
    """What was done to a run, and what was seen of it meanwhile."""

    done: Counter[str] = field(default_factory=Counter)
    """Strikes, by kind."""
    newest: list[int] = field(default_factory=list)
    """Steps of the newest checkpoint, one a look."""
    held: dict[int, list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))
    """Megabytes and open files of each agent, one a strike."""

    def grown(self, which: int) -> float:
        """Return by how much the means of agents' first and last thirds differ, at most.

        Args:
            which: 0 for megabytes, 1 for open files.
        """
        most = 0.0
        for series in self.held.values():
            # An agent has all that it needs after its first start.
            third = len(series[1:]) // 3
            if third > 1:
                first, last = (
                    sum(one[which] for one in part) / third
                    for part in (series[1 : third + 1], series[-third:])
                )
                most = max(most, last - first)
        return most


class Striker:
    """Strikes a run at random, of a seed."""

    def __init__(
        self, agents: Agents, network: Nodes | None, folder: Path, seed: int, ranks: int
    ) -> None:
        self._agents, self._network, self._folder = agents, network, folder
        self._rng, self._ranks = random.Random(seed), ranks
        self._torn_before: set[str] = set()
        """The checkpoint that was torn last."""
        self.struck = Struck()

    def until(self, deadline: float) -> Struck:
        """Strike until the deadline; return what was done and seen."""
        rng = self._rng
        kinds = ["killed"] * 4 + ["frozen"] * 2 + ["torn"] * 3
        kinds += ["cut"] * (0 if self._network is None else 3)
        while time.monotonic() < deadline and not self._agents.done:
            # Most strikes come when the run has got further, some wherever it is, as in a start.
            further = rng.random() < 0.75
            self._watch(120.0 if further else rng.uniform(3.0, 12.0), until_further=further)
            if len(self._watch(rng.uniform(0.0, 3.0))) == self._ranks:
                for pid in self._agents.pids:
                    self.struck.held[pid].append(held_by(pid))
            kind = rng.choice(kinds)
            if getattr(self, f"_{kind}")():
                self.struck.done[kind] += 1
        return self.struck

    def _watch(self, seconds: float, until_further: bool = False) -> list[int]:
        """Look after the run for a while, or until it has written another checkpoint."""
        deadline, newest = time.monotonic() + seconds, self.struck.newest
        before = newest[-1] if newest else 0
        while True:
            ranks = self._agents.look()
            if there := checkpoints(self._folder):
                newest.append(int(there[-1].name.split("-")[1]))
            further = until_further and newest and newest[-1] > before
            if further or time.monotonic() > deadline or self._agents.done:
                return ranks
            time.sleep(0.2)

    def _signal(self, number: int) -> bool:
        ranks = self._agents.look()
        if len(ranks) < self._ranks:
            # They are being started.
            return False
        try:
            os.kill(self._rng.choice(ranks), number)
        except ProcessLookupError:
            return False
        return True

    def _killed(self) -> bool:
        return self._signal(signal.SIGKILL)

    def _frozen(self) -> bool:
        return self._signal(signal.SIGSTOP)

    def _cut(self) -> bool:
        """Pull the cable of a node, and put it in again after a while."""
        assert self._network is not None
        node = self._rng.randrange(len(self._network.names))
        self._network.plug(node, False)
        try:
            self._watch(self._rng.uniform(*CUT))
        finally:
            self._network.plug(node, True)
        return True

    def _torn(self) -> bool:
        """Spoil a file of the newest checkpoint, and kill a rank, so that all read it.

        Where the one before it may be damaged too it is left alone: a run without a whole
        checkpoint refuses to start, which is a fault of its own.
        """
        there = checkpoints(self._folder)
        if len(there) < 2 or self._torn_before & {path.name for path in there[-2:]}:
            return False
        data = self._rng.choice(sorted(there[-1].iterdir()))
        how = self._rng.choice((tear, flip, Path.unlink))
        try:
            how(data)
        except FileNotFoundError:
            # Pruned meanwhile.
            return False
        self._torn_before = {there[-1].name}
        self._killed()
        return True


def tear(file: Path) -> None:
    """Cut a file in half."""
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    """Turn the bits of one byte; the size stays."""
    written = bytearray(file.read_bytes())
    written[len(written) // 2] ^= 255
    file.write_bytes(written)
