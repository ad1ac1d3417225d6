"""Nodes as network namespaces of this machine, the links between them shaped at will.

A node is one namespace or several on a bridge of its own, which is not shaped; each has a card of
its own to a bridge that all share, shaped both ways, as GPUs have NVLink inside and a NIC each.
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
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MTU = 65_000
"""Long packets: a card does without the cores that thousands of short ones would take here."""

TCP = {
    "tcp_congestion_control": "reno",
    "tcp_slow_start_after_idle": "0",
    "tcp_wmem": "4096 65536 131072",
}
"""Whatever the machine prefers: bbr, which paces by its own guess of the rate, takes up to a fifth
longer over these links when both ends send, and never twice the same. And of what a rank sends the
kernel holds little: a message that it took whole would count as sent, and the next round's would
share the link with it, which those of a GPU never do."""


class NotAllowed(RuntimeError):
    """This machine does not let us make network namespaces."""


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NotAllowed(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


class Nodes:
    """Namespaces, those of a node one after another, and the hub that has their bridges."""

    def __init__(self, hub: str, names: list[str], hosts: int = 1) -> None:
        self.hub, self.names, self.hosts = hub, names, hosts
        self.cores: list[set[int]] | None = None
        """What each namespace's processes may use, if not all that this process may."""

    def address(self, index: int) -> str:
        """Return the address of a namespace, inside our own ones only."""
        node, host = divmod(index, self.hosts)
        return f"10.77.{node}.{host + 1}"

    def shape(self, megabits: float) -> None:
        """Let every namespace send and receive so many megabits a second at most across nodes."""
        for index, name in enumerate(self.names):
            for where, card in ((name, "eth1"), (self.hub, f"across{index}")):
                shaper = f"tc -n {where} qdisc replace dev {card} root tbf rate {megabits:.3f}mbit"
                # A packet longer than the burst is cut into many, which costs more than sending it.
                _run(*shaper.split(), "burst", "72kb", "limit", "64mb")

    def plug(self, index: int, plugged: bool) -> None:
        """Put the cable of a namespace to other nodes in, or pull it out."""
        _run(*f"ip -n {self.hub} link set across{index} {'up' if plugged else 'down'}".split())

    def sent_bytes(self, index: int) -> int:
        """Count bytes that a namespace has sent to other nodes so far, headers included."""
        said = _run(*f"ip -n {self.names[index]} -j -s link show eth1".split())
        return int(json.loads(said)[0]["stats64"]["tx"]["bytes"])

    def torchrun(
        self, ranks: int, arguments: Sequence[str], timeout: float, port: int = 29500
    ) -> str:
        """Run one torchrun over all namespaces, `ranks` in each; return what the first printed.

        Raises:
            RuntimeError: as `run`.
        """
        launcher = (sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(self.names)))
        common = ("--master-addr", self.address(0), "--master-port", str(port), *arguments)
        ranked = ("--nproc-per-node", str(ranks), *common)
        commands = [
            (*launcher, "--node-rank", str(node), *ranked) for node in range(len(self.names))
        ]
        return self.run(commands, timeout)

    def run(
        self,
        commands: Sequence[Sequence[str]],
        timeout: float,
        variables: Mapping[str, str] | None = None,
    ) -> str:
        """Run one command in each namespace, at once; return what the first one's printed.

        Args:
            commands: as many as there are namespaces.
            timeout: seconds for all of them.
            variables: of their environment, beside this process's.

        Raises:
            RuntimeError: one failed or took too long; the message ends with the output of all.
        """
        env = os.environ | {
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            **(variables or {}),
        }
        with contextlib.ExitStack() as stack:
            outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in self.names]
            launched = [
                subprocess.Popen(
                    [*self._pinned(index), "ip", "netns", "exec", name, *command],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=env,
                    cwd=ROOT,
                )
                for index, (name, command, output) in enumerate(
                    zip(self.names, commands, outputs, strict=True)
                )
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

    def _pinned(self, index: int) -> tuple[str, ...]:
        """Return what begins a command of a namespace that has cores of its own."""
        if self.cores is None:
            return ()
        return ("taskset", "-c", ",".join(map(str, sorted(self.cores[index]))))

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


def _plug(hub: str, bridge: str, port: str, name: str, card: str) -> None:
    """Give a namespace a card on a bridge of the hub."""
    _run(*f"ip link add {card} netns {name} type veth peer name {port} netns {hub}".split())
    _run(*f"ip -n {hub} link set {port} mtu {MTU} master {bridge} up".split())
    _run(*f"ip -n {name} link set {card} mtu {MTU} up".split())


@contextlib.contextmanager
def nodes(count: int, hosts: int = 1) -> Iterator[Nodes]:
    """Make `count` nodes of `hosts` namespaces each, and remove them at the end.

    Raises:
        NotAllowed: the machine lacks the tools or the rights.
    """
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise NotAllowed(f"there is no `{tool}`: install iproute2")
    if os.geteuid() != 0:
        raise NotAllowed("network namespaces need root")
    # So that what is made here is removed again when this process is told to end, too. A thread
    # leaves that to its process.
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1)) if main else None
    stem = f"lhcp{os.getpid()}"
    hub, made = f"{stem}-hub", Nodes("", [])
    network = Nodes(hub, [f"{stem}-{index}" for index in range(count * hosts)], hosts)
    try:
        for name in (hub, *network.names):
            _run("ip", "netns", "add", name)
            made.names.append(name)
            _run(*f"ip -n {name} link set lo up".split())
            for key, value in TCP.items():
                setting = f"echo '{value}' > /proc/sys/net/ipv4/{key}"
                _run(*f"ip netns exec {name} sh -c".split(), setting)
        for bridge in ("across", *(f"node{node}" for node in range(count))):
            _run(*f"ip -n {hub} link add {bridge} type bridge".split())
            _run(*f"ip -n {hub} link set {bridge} up".split())
        for index, name in enumerate(network.names):
            own, address = index // hosts, network.address(index)
            _plug(hub, f"node{own}", f"inside{index}", name, "eth0")
            _plug(hub, "across", f"across{index}", name, "eth1")
            _run(*f"ip -n {name} addr add {address}/24 dev eth0".split())
            # One address, by either card: gloo knows a rank by one.
            for node in set(range(count)) - {own}:
                route = f"ip -n {name} route add 10.77.{node}.0/24 dev eth1 src {address}"
                _run(*route.split())
        yield network
    finally:
        made.end_processes()
        for name in made.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        if main:
            signal.signal(signal.SIGTERM, before)
