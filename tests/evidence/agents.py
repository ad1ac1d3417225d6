"""torchrun's agents of a run on one node or two, looked after as a scheduler looks after them."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.rotation.namespaces import Nodes
from tests.faults.runs import ROOT, children, free_port

RESTARTS = 10_000
"""Of ranks by an agent: more than there are strikes."""


class Agents:
    """Agents of one run, by launch/torchrun.sh; one that ends before the run is started again.

    Args:
        network: the nodes; None: this machine is the only one.
        ranks: of all nodes together.
        arguments: of lhcp train.
        log: what all of them print.
    """

    def __init__(
        self, network: Nodes | None, ranks: int, arguments: Sequence[str], log: Path
    ) -> None:
        self._network, self._arguments, self._log = network, arguments, log
        self.nodes = 1 if network is None else len(network.names)
        self._environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
            "NUM_NODES": str(self.nodes),
            "GPUS_PER_NODE": str(ranks // self.nodes),
            "MAX_RESTARTS": str(RESTARTS),
            "HEAD_NODE": f"localhost:{free_port()}",
        }
        if network is not None:
            place = {"HEAD_NODE": f"{network.address(0)}:29400", "GLOO_SOCKET_IFNAME": "eth0"}
            self._environment |= place
        self.restarted = 0
        """How often an agent was started again."""
        self.seen: set[int] = set()
        """Every process of the run, so far as anybody looked."""
        self._processes = [self._start(node) for node in range(self.nodes)]

    def _start(self, node: int) -> subprocess.Popen[bytes]:
        inside = [] if self._network is None else ["ip", "netns", "exec", self._network.names[node]]
        words = [*inside, "bash", "launch/torchrun.sh", *self._arguments]
        own: dict[str, str] = {}
        if self._network is not None:
            # A machine is found by its name, and these nodes share theirs.
            own["PET_LOCAL_ADDR"] = self._network.address(node)
            own["PET_RDZV_CONF"] = f"is_host={node == 0}"
        environment: Mapping[str, str] = os.environ | self._environment | own
        with open(self._log, "ab") as file:
            return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=file, stderr=file)

    @property
    def pids(self) -> list[int]:
        """Processes of the agents, by node."""
        return [process.pid for process in self._processes]

    def look(self) -> list[int]:
        """Start agents again that failed; return the ranks that there are."""
        codes = [process.poll() for process in self._processes]
        for node, code in enumerate(codes):
            # One that ends as it should knows that the run is done.
            if code and 0 not in codes:
                self._processes[node] = self._start(node)
                self.restarted += 1
        ranks = [rank for pid in self.pids for rank in children(pid)]
        self.seen |= {*self.pids, *ranks}
        return ranks

    @property
    def done(self) -> bool:
        """Whether an agent says that the run is done."""
        return any(process.poll() == 0 for process in self._processes)

    def wait(self, seconds: float) -> list[int | None]:
        """Look after the run until it is done; return the agents' status, None of those left."""
        deadline = time.monotonic() + seconds
        while not self.done and time.monotonic() < deadline:
            self.look()
            time.sleep(0.2)
        deadline = min(deadline, time.monotonic() + 60)
        while any(p.poll() is None for p in self._processes) and time.monotonic() < deadline:
            time.sleep(0.2)
        return [process.poll() for process in self._processes]

    def end(self) -> None:
        """End what is there; agents end their ranks."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait()
