"""Nodes as network namespaces of this machine, on one bridge, their links shaped at will.

Needs root, iproute2 and a kernel that allows namespaces. Everything made here is removed again,
whatever happens.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MTU = 65_000
"""Long packets: a card does without the cores that thousands of short ones would take here."""

TCP = {"tcp_congestion_control": "reno", "tcp_slow_start_after_idle": "0"}
"""Whatever the machine prefers: bbr, which paces by its own guess of the rate, takes up to a fifth
longer over these links when both ends send, and never twice the same."""


class NotAllowed(RuntimeError):
    """This machine does not let us make network namespaces."""


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NotAllowed(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


class Nodes:
    """Namespaces that hang on one bridge, which is in a namespace of its own."""

    def __init__(self, names: list[str], hub: str = "") -> None:
        self.names, self._hub = names, hub

    @staticmethod
    def address(node: int) -> str:
        """Return the address of a node, inside our own namespaces only."""
        return f"10.77.0.{node + 1}"

    def shape(self, megabits: float) -> None:
        """Let every node send at most so many megabits a second."""
        for name in self.names:
            shaper = f"tc -n {name} qdisc replace dev eth0 root tbf rate {megabits:.3f}mbit"
            # A packet longer than the burst is cut into many, which costs more than its sending.
            _run(*shaper.split(), "burst", "128kb", "limit", "64mb")

    def plug(self, node: int, plugged: bool) -> None:
        """Put the cable of a node in, or pull it out."""
        _run(*f"ip -n {self._hub} link set port{node} {'up' if plugged else 'down'}".split())

    def sent_bytes(self, node: int) -> int:
        """Count bytes that a node has sent so far, headers included."""
        said = _run(*f"ip -n {self.names[node]} -j -s link show eth0".split())
        return int(json.loads(said)[0]["stats64"]["tx"]["bytes"])

    def torchrun(
        self, ranks_per_node: int, arguments: Sequence[str], timeout: float, port: int = 29500
    ) -> str:
        """Run one torchrun over all nodes; return what node 0 printed.

        Raises:
            RuntimeError: a node failed or took too long; the message ends with all nodes' output.
        """
        env = os.environ | {
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        with contextlib.ExitStack() as stack:
            outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in self.names]
            launched = [
                subprocess.Popen(
                    [
                        *("ip", "netns", "exec", name),
                        *(sys.executable, "-m", "torch.distributed.run"),
                        *("--nnodes", str(len(self.names)), "--node-rank", str(node)),
                        *("--nproc-per-node", str(ranks_per_node)),
                        *("--master-addr", self.address(0), "--master-port", str(port)),
                        *arguments,
                    ],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=env,
                    cwd=ROOT,
                )
                for node, (name, output) in enumerate(zip(self.names, outputs, strict=True))
            ]
            try:
                codes = _wait(launched, timeout)
            finally:
                self.end_processes()
                for process in launched:
                    process.wait()
            texts = []
            for output in outputs:
                output.seek(0)
                texts.append(output.read())
        if codes != [0] * len(codes):
            shown = "\n".join(text[-3000:] for text in texts)
            raise RuntimeError(f"nodes ended with {codes}, None after {timeout:.0f} s:\n{shown}")
        return texts[0]

    def end_processes(self) -> None:
        """End what still runs on the nodes: torchrun's workers are in sessions of their own."""
        for name in self.names:
            listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            for pid in listed.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)


def _wait(launched: Sequence[subprocess.Popen[bytes]], timeout: float) -> list[int | None]:
    """Return exit statuses once all have ended; None for those that had not in time.

    When one has failed, the others get a few seconds more.
    """
    deadline = time.monotonic() + timeout
    while True:
        codes = [process.poll() for process in launched]
        if None not in codes or time.monotonic() > deadline:
            return codes
        if any(codes):
            deadline = min(deadline, time.monotonic() + 10)
        time.sleep(0.2)


@contextlib.contextmanager
def nodes(count: int) -> Iterator[Nodes]:
    """Make `count` nodes on one bridge and remove them at the end.

    Raises:
        NotAllowed: the machine lacks the tools or the rights.
    """
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise NotAllowed(f"there is no `{tool}`: install iproute2")
    if os.geteuid() != 0:
        raise NotAllowed("network namespaces need root")
    # So that what is made here is removed again when this process is told to end, too.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    stem = f"lhcp{os.getpid()}"
    hub, made = f"{stem}-hub", Nodes([])
    bridged = [f"{stem}-{node}" for node in range(count)]
    try:
        for name in (hub, *bridged):
            _run("ip", "netns", "add", name)
            made.names.append(name)
            _run(*f"ip -n {name} link set lo up".split())
            for key, value in TCP.items():
                setting = f"echo {value} > /proc/sys/net/ipv4/{key}"
                _run(*f"ip netns exec {name} sh -c".split(), setting)
        _run(*f"ip -n {hub} link add br0 type bridge".split())
        _run(*f"ip -n {hub} link set br0 up".split())
        for node, name in enumerate(bridged):
            port = f"port{node}"
            _run(*f"ip link add eth0 netns {name} type veth peer name {port} netns {hub}".split())
            _run(*f"ip -n {hub} link set {port} mtu {MTU} master br0 up".split())
            _run(*f"ip -n {name} addr add {Nodes.address(node)}/24 dev eth0".split())
            _run(*f"ip -n {name} link set eth0 mtu {MTU} up".split())
        yield Nodes(bridged, hub)
    finally:
        made.end_processes()
        for name in made.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        signal.signal(signal.SIGTERM, before)
