"""Nodes as network namespaces of this machine: a shaped link, and the model held against it.

    python bench/netns.py --out bench/results/netns.json       # two nodes, three rates
    python bench/netns.py --train                              # four nodes x 8 ranks: dp 4 x cp 8

Each namespace is a node of one torchrun over gloo; their links are shaped by `tc tbf` to rates that
make the rotation communication-bound, balanced and compute-bound. Needs root, iproute2 and a kernel
that allows namespaces. Everything made here is removed again, whatever happens.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent
RATIO = (0.8, 1.25)
"""What measured over predicted exposed time must keep to."""
SMALL = 0.03
"""Exposed time below this share of T is compared by its difference, as a share of T."""


class NotAllowed(RuntimeError):
    """This machine does not let us make network namespaces."""


def _ip(*args: str, netns: str | None = None) -> None:
    inside = [] if netns is None else ["-n", netns]
    _run("ip", *inside, *args)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NotAllowed(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")


class Nodes:
    """Namespaces that hang on one bridge, which is in a namespace of its own."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    @staticmethod
    def address(node: int) -> str:
        """Of a node, inside our own namespaces only."""
        return f"10.77.0.{node + 1}"

    def shape(self, megabits: float) -> None:
        """Let every node send at most so many megabits a second."""
        for name in self.names:
            rate = f"{megabits:.3f}mbit"
            _run(
                *f"tc -n {name} qdisc replace dev eth0 root tbf rate {rate}".split(),
                *["burst", "32kb", "limit", "64mb"],
            )

    def sent_bytes(self, node: int) -> int:
        """Bytes that a node has sent so far, headers included."""
        done = subprocess.run(
            ["ip", "-n", self.names[node], "-j", "-s", "link", "show", "eth0"],
            capture_output=True,
            text=True,
            check=True,
        )
        return int(json.loads(done.stdout)[0]["stats64"]["tx"]["bytes"])

    def torchrun(
        self, ranks_per_node: int, arguments: Sequence[str], timeout: float, port: int = 29500
    ) -> str:
        """Run one torchrun over all nodes; return what node 0 printed.

        Raises:
            RuntimeError: a node failed or took too long; the message ends with its output.
        """
        env = os.environ | {
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        with contextlib.ExitStack() as stack:
            outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in self.names]
            return self._run_all(outputs, env, ranks_per_node, arguments, timeout, port)

    def _run_all(
        self,
        outputs: list[IO[str]],
        env: dict[str, str],
        ranks_per_node: int,
        arguments: Sequence[str],
        timeout: float,
        port: int,
    ) -> str:
        launched = [
            subprocess.Popen(
                [
                    *("ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"),
                    *("--nnodes", str(len(self.names)), "--node-rank", str(node)),
                    *("--nproc-per-node", str(ranks_per_node)),
                    *("--master-addr", self.address(0), "--master-port", str(port)),
                    *arguments,
                ],
                stdout=outputs[node],
                stderr=subprocess.STDOUT,
                env=env,
                cwd=HERE.parent,
                start_new_session=True,
            )
            for node, name in enumerate(self.names)
        ]
        codes: list[int | None] = [None] * len(launched)
        try:
            for node, process in enumerate(launched):
                codes[node] = process.wait(timeout)
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in launched:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        texts = []
        for output in outputs:
            output.seek(0)
            texts.append(output.read())
        if any(codes):
            raise RuntimeError(f"nodes ended with {codes}:\n" + "\n".join(t[-3000:] for t in texts))
        if None in codes:
            raise RuntimeError(
                f"no end within {timeout:.0f} s:\n" + "\n".join(t[-3000:] for t in texts)
            )
        return texts[0]


@contextlib.contextmanager
def nodes(count: int) -> Iterator[Nodes]:
    """Make `count` nodes on one bridge and remove them at the end.

    Raises:
        NotAllowed: the machine lacks the tools or the rights.
    """
    for tool, package in (("ip", "iproute2"), ("tc", "iproute2")):
        if shutil.which(tool) is None:
            raise NotAllowed(f"there is no `{tool}`: install {package}")
    if os.geteuid() != 0:
        raise NotAllowed("network namespaces need root")
    stem = f"lhcp{os.getpid()}"
    hub, names = f"{stem}-hub", [f"{stem}-{node}" for node in range(count)]
    made: list[str] = []
    try:
        for name in (hub, *names):
            _ip("netns", "add", name)
            made.append(name)
            _ip("link", "set", "lo", "up", netns=name)
        _ip("link", "add", "br0", "type", "bridge", netns=hub)
        _ip("link", "set", "br0", "up", netns=hub)
        for node, name in enumerate(names):
            port = f"port{node}"
            _ip(*f"link add eth0 netns {name} type veth peer name {port} netns {hub}".split())
            _ip(*f"link set {port} master br0 up".split(), netns=hub)
            _ip(*f"addr add {Nodes.address(node)}/24 dev eth0".split(), netns=name)
            _ip(*["link", "set", "eth0", "up"], netns=name)
        yield Nodes(names)
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def measure(network: Nodes, args: argparse.Namespace) -> dict[str, Any]:
    """Predict and measure on two nodes; the document of bench/scaling_model.py."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (
            *(str(HERE / "scaling_model.py"), "--measure", "--device", "cpu"),
            *("--nodes", str(len(network.names)), "--rotations", *args.rotations),
            *("--seqlens", str(args.seqlen), "--heads", str(args.heads)),
            *("--head-dim", str(args.head_dim), "--repeats", str(args.repeats)),
            *("--large-message", str(args.large_message), "--out", f"{folder}/found"),
        )
        text = network.torchrun(1, arguments, args.timeout)
        print(text[text.find(args.rotations[0] + " S=") :].rsplit("\n{", 1)[0], flush=True)
        document: dict[str, Any] = json.loads(Path(f"{folder}/found.json").read_text())
    return document


def rates(document: dict[str, Any], balance: Sequence[float]) -> list[float]:
    """Megabits a second at which messages alone take `balance` times as long as compute alone."""
    phases = [record[phase] for record in document["records"] for phase in ("forward", "backward")]
    num_bytes = sum(phase["bytes"] for phase in phases)
    seconds = sum(phase["measured"]["C"] for phase in phases) / 1e3
    return [8 * num_bytes / (b * seconds) / 1e6 for b in balance]


def verdicts(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Measured over predicted exposed time, by rotation and direction."""
    found = []
    for record in document["records"]:
        for phase in ("forward", "backward"):
            guess, real = record[phase]["predicted"], record[phase]["measured"]
            small = guess["exposed"] < SMALL * guess["T"]
            ratio = real["exposed"] / guess["exposed"] if guess["exposed"] > 0 else None
            off = (real["exposed"] - guess["exposed"]) / real["T"]
            ok = abs(off) <= 0.05 if small else RATIO[0] <= (ratio or 0.0) <= RATIO[1]
            found.append(
                {
                    "rotation": record["rotation"],
                    "phase": phase,
                    "ratio": ratio,
                    "difference_over_T": off,
                    "small": small,
                    "ok": ok,
                }
            )
    return found


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Three rates on two nodes."""
    with nodes(2) as network:
        free = measure(network, args)
        regimes = []
        names = ("communication-bound", "balanced", "compute-bound")
        for name, megabits in zip(names, rates(free, args.balance), strict=True):
            network.shape(megabits)
            print(f"\n{name}: {megabits:.0f} Mbit/s", flush=True)
            document = measure(network, args)
            said = verdicts(document)
            for v in said:
                number = "-" if v["ratio"] is None else f"{v['ratio']:.2f}"
                print(
                    f"  {v['rotation']} {v['phase']}: exposed measured / model {number}, "
                    f"difference {100 * v['difference_over_T']:.1f}% of T: "
                    f"{'ok' if v['ok'] else 'OFF'}",
                    flush=True,
                )
            regimes.append(
                {"name": name, "mbit_s": megabits, "verdicts": said, "document": document}
            )
    return {"unshaped": free, "regimes": regimes}


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Both training stages on four nodes of eight ranks: dp 4 x cp 8, a tiny model."""
    with nodes(4) as network, tempfile.TemporaryDirectory() as folder:
        arguments = (
            *("launch/train.py", "tiny", "--cp", "8", "--seqlen", "1024", "--global-batch", "4"),
            *("--lighthouse.num-strata", "16", "--lighthouse.topk", "32"),
            *("--lighthouse-steps", str(args.steps), "--dense-steps", str(args.steps)),
            *("--eval-every", str(args.steps), "--eval-sequences", "4", "--sample-bytes", "0"),
            *("--out", folder),
        )
        before = network.sent_bytes(0)
        text = network.torchrun(8, arguments, args.timeout)
        print(text)
        report = json.loads(Path(f"{folder}/report.json").read_text())
        return {"report": report, "node_0_sent_bytes": network.sent_bytes(0) - before}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rotations", nargs="*", default=["p2p", "allgather"])
    parser.add_argument("--seqlen", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--balance", type=float, nargs=3, default=[3.0, 1.0, 0.3], help="M / C of the three rates"
    )
    parser.add_argument("--large-message", type=int, default=2**22)
    parser.add_argument("--timeout", type=float, default=1200, help="seconds of one torchrun")
    parser.add_argument("--train", action="store_true", help="both training stages on 4 x 8 ranks")
    parser.add_argument("--steps", type=int, default=10, help="of each training stage")
    parser.add_argument("--out", help="write the JSON document here")
    args = parser.parse_args()
    try:
        document = train(args) if args.train else compare(args)
    except NotAllowed as error:
        sys.exit(f"network namespaces are not possible here: {error}")
    if args.out:
        Path(args.out).write_text(json.dumps(document) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
