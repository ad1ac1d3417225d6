"""What the benchmarks share: joining, the card, the ceilings, the gate before any number."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from lhcp.attention import lighthouse_attention
from lhcp.collectives import Rows, Works, all_gathers, all_to_alls, exchange
from lhcp.layout import LayoutName
from lhcp.mesh import Ranks
from lhcp.ring.block import BLOCKS
from lhcp.ring.function import ring_attention
from lhcp.sharding import shard
from lhcp.testing.inputs import qkv, small_config
from lhcp.testing.tolerance import assert_close_float64, assert_within_budget
from lhcp.training.ranks import leave


def join(device: str) -> torch.device:
    """Join the ranks that torchrun started; a plain process is one rank.

    Args:
        device: "cpu" (gloo), "cuda" (NCCL; ranks beyond the GPUs share them), or "auto": a GPU if
            there is one for each rank.
    """
    env = {name: int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK")}
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device == "auto":
        device = "cuda" if 0 < local_size <= torch.cuda.device_count() else "cpu"
    if device == "cuda":
        where = torch.device("cuda", env["LOCAL_RANK"] % torch.cuda.device_count())
        torch.cuda.set_device(where)
        # Without device_id: NCCL would refuse two ranks that announce one device at once.
        backend = "cpu:gloo,cuda:nccl"
    else:
        where, backend = torch.device("cpu"), "gloo"
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return where


def run_to_exit(main: Callable[[], None]) -> None:
    """Call `main` and leave the ranks; an error ends this rank at once with status 1."""
    try:
        main()
    except BaseException as error:
        print(f"rank {os.environ.get('RANK', '0')}: {type(error).__name__}: {error}", flush=True)
        if not isinstance(error, SystemExit):
            sys.excepthook(*sys.exc_info())
        leave(1)
    leave(0)


def card(device: torch.device, ranks: Ranks) -> dict[str, Any]:
    """Hardware, versions, commit and ceilings; a collective of all ranks."""
    cuda = device.type == "cuda"
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "cores": os.cpu_count(),
        "world_size": ranks.world_size,
        "nodes": int(os.environ.get("GROUP_WORLD_SIZE", "1")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "copy_gb_s": round(copy_bandwidth(device) / 1e9, 1),
    }
    if cuda:
        facts["cudnn"] = torch.backends.cudnn.version()
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    if ranks.world_size > 1:
        facts["link"] = link(ranks, device)
    return facts


def cpu_name() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if "model name" in x), platform.machine())


def commit() -> str:
    """The checkout's commit, with "+" if files differ from it; "" outside a checkout."""

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def seconds_of(run: Callable[[], Any], device: torch.device, repeats: int = 7) -> float:
    """Median seconds of a call, on the GPU's clock where there is one; three unmeasured before."""
    found = []
    for repeat in range(repeats + 3):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            start.record()
            run()
            stop.record()
            stop.synchronize()
            seconds = start.elapsed_time(stop) / 1e3
        else:
            begin = time.perf_counter()
            run()
            seconds = time.perf_counter() - begin
        if repeat >= 3:
            found.append(seconds)
    return statistics.median(found)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy, read and written counted."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.ones(size, dtype=torch.uint8, device=device)
    into = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: into.copy_(source), device)


def link(ranks: Ranks, device: torch.device, large: int | None = None) -> dict[str, float]:
    """Latency and bandwidth of messages round the ring of ranks, all ranks at once.

    Args:
        large: bytes of the long message; 64 MiB on a GPU, 4 MiB on a CPU.

    Returns:
        latency_us, gb_s: of the slowest rank; a message takes latency + bytes / bandwidth.
    """
    if large is None:
        large = 2**26 if device.type == "cuda" else 2**22

    def run(num_bytes: int) -> Callable[[], None]:
        post = round_the_ring(num_bytes, ranks, device)
        return lambda: post().wait()

    latency, rate = latency_and_rate(run, large, ranks, device)
    return {"latency_us": 1e6 * latency, "gb_s": rate / 1e9}


def round_the_ring(num_bytes: int, ranks: Ranks, device: torch.device) -> Callable[[], Works]:
    """Return what posts messages to the next rank and from the previous, as rotations do."""
    assert ranks.flat is not None
    group, rank, world = ranks.flat, ranks.rank, ranks.world_size
    out, into = (torch.ones(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    return lambda: exchange([(out, (rank + 1) % world)], [(into, (rank - 1) % world)], group)


def byte_compute(
    run: Callable[[], Any], rate: float, ranks: Ranks, repeats: int = 48, long: float = 0.05
) -> float:
    """Seconds that a byte, sent or received, adds to compute on CPU ranks; a collective.

    Measured beside compute, and not as the CPU time of ranks that only move bytes: the kernel's own
    part runs on whatever core is there, at the cost of nobody if that one is idle.

    Args:
        run: computes. rate: bytes a second of neighbour messages. long: seconds of compute. Many
            short ones, since over a slow link the difference is a few percent.
    """
    device = torch.device("cpu")
    calls = ceil(long / slowest(seconds_of(run, device), ranks))
    # They last about as long as the compute; of longer ones the part that was under way counts.
    num_bytes = int(min(2**26, max(2**10, rate * long)))
    messages = round_the_ring(num_bytes, ranks, device)

    def seconds(post: Callable[[], Works]) -> tuple[float, float]:
        """Of the compute, and until the messages are there as well: of the slowest rank."""
        dist.barrier(group=ranks.flat)
        begin = time.perf_counter()
        works = post()
        for _ in range(calls):
            run()
        computed = time.perf_counter() - begin
        works.wait()
        both = time.perf_counter() - begin
        return slowest(computed, ranks), slowest(both, ranks)

    alone, beside, moved = [], [], []
    for _ in range(repeats):
        alone.append(seconds(Works)[0])
        computed, both = seconds(messages)
        beside.append(computed)
        moved.append(2 * num_bytes * computed / both)
    # Lower quartiles: what else runs on the machine only ever adds.
    added = statistics.quantiles(beside)[0] - statistics.quantiles(alone)[0]
    return max(0.0, added / statistics.median(moved))


def latency_and_rate(
    make: Callable[[int], Callable[[], None]], large: int, ranks: Ranks, device: torch.device
) -> tuple[float, float]:
    """Seconds without bytes, and bytes a second, of what make(bytes) returns; a collective."""

    def seconds(num_bytes: int) -> float:
        run = make(num_bytes)
        run()
        dist.barrier(group=ranks.flat)
        return slowest(seconds_of(run, device), ranks)

    small = 1024
    short, long = seconds(small), seconds(large)
    rate = (large - small) / max(long - short, 1e-9)
    return max(short - small / rate, 0.0), rate


def collective_factors(
    ranks: Ranks, device: torch.device, rate: float, large: int
) -> tuple[float, float, float]:
    """Gathers and all-to-alls, four at once as rotations post them, over neighbour messages.

    Args:
        rate: bytes a second of neighbour messages; large: bytes of one rank's part.

    Returns:
        time of a gather over that of as many bytes from neighbours; the same of an all-to-all;
        seconds of a gather without bytes.
    """
    world, ones = ranks.world_size, [1] * ranks.world_size
    assert ranks.flat is not None
    group = ranks.flat

    def gather(num_bytes: int) -> Callable[[], None]:
        source = torch.ones(4, num_bytes // 16, device=device)
        into = torch.ones(4, world * num_bytes // 16, device=device)

        def run() -> None:
            all_gathers(list(zip(into, source, strict=True)), group).wait()

        return run

    def all_to_all(num_bytes: int) -> Callable[[], None]:
        source, into = torch.ones(2, 4, world, num_bytes // 16, device=device)

        def run() -> None:
            rows = [Rows(into[i], ones, source[i], ones) for i in range(4)]
            all_to_alls(rows, group).wait()

        return run

    latency, gathered = latency_and_rate(gather, large, ranks, device)
    _, exchanged = latency_and_rate(all_to_all, large, ranks, device)
    return rate / (gathered * (world - 1)), rate / (exchanged * (world - 1)), latency


def slowest(seconds: float, ranks: Ranks) -> float:
    """The largest of all ranks' seconds; a collective."""
    everybody = [seconds] * ranks.world_size
    if ranks.world_size > 1:
        dist.all_gather_object(everybody, seconds, group=ranks.flat)
    return max(everybody)


def gate(
    ranks: Ranks,
    device: torch.device,
    rotation: str,
    layout: LayoutName,
    dtype: torch.dtype,
    heads: tuple[int, int],
    head_dim: int,
    backend: str = "auto",
) -> str | None:
    """Compare a rotation with one rank: out, dq, dk, dv; and the lighthouse layer, likewise.

    In float64 on a CPU; on a GPU in `dtype`, by the error that one rank has against float64. A
    collective.

    Returns:
        None, or what is wrong on some rank.
    """
    problem = None
    try:
        exact = torch.float64 if device.type == "cpu" else dtype
        chosen = "auto" if device.type == "cpu" else backend
        whole = qkv(
            256 * ranks.world_size,
            num_heads=heads[0],
            num_kv_heads=heads[1],
            head_dim=head_dim,
            dtype=exact,
            device=str(device),
        )

        def dense(q: Tensor, k: Tensor, v: Tensor, group: Ranks) -> Tensor:
            math = q.dtype == torch.float64 and q.device.type == "cuda"
            return ring_attention(
                q,
                k,
                v,
                group=group,
                layout=layout,
                rotation=rotation if group.world_size > 1 else "auto",
                backend="math" if math else chosen,
            )

        _compare(dense, whole, ranks, layout)
        config, seqlen = small_config(num_strata=2 * ranks.world_size)

        def layer(q: Tensor, k: Tensor, v: Tensor, group: Ranks) -> Tensor:
            return lighthouse_attention(
                q,
                k,
                v,
                config=config,
                group=group,
                layout=layout,
                rotation=rotation if group.world_size > 1 else "auto",
                kernels="auto",
            )

        if device.type == "cpu":
            small = qkv(seqlen, num_heads=heads[0], num_kv_heads=heads[1], head_dim=16)
            _compare(layer, small, ranks, layout)
    except AssertionError as error:
        problem = f"rank {ranks.rank}: {error}"
    everybody: list[str | None] = [problem] * ranks.world_size
    if ranks.world_size > 1:
        dist.all_gather_object(everybody, problem, group=ranks.flat)
    return next((said for said in everybody if said), None)


def _compare(
    function: Callable[[Tensor, Tensor, Tensor, Ranks], Tensor],
    whole: tuple[Tensor, ...],
    ranks: Ranks,
    layout: LayoutName,
) -> None:
    def answer(inputs: tuple[Tensor, ...], group: Ranks) -> tuple[Tensor, ...]:
        *leaves, dout = (x.detach() for x in inputs)
        leaves = [x.requires_grad_() for x in leaves]
        out = function(*leaves, group)  # type: ignore[arg-type]
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    def own(answers: tuple[Tensor, ...]) -> list[Tensor]:
        return [shard(x, ranks, layout=layout) for x in answers]

    ours = answer(tuple(own(whole)), ranks)
    one = own(answer(whole, Ranks()))
    low = whole[0].dtype != torch.float64
    true = own(answer(tuple(x.double() for x in whole), Ranks())) if low else one
    for name, got, single, exact in zip(("out", "dq", "dk", "dv"), ours, one, true, strict=True):
        if low:
            assert_within_budget(name, got, single, exact)
        else:
            assert_close_float64(name, got, single)


def backends(dtype: torch.dtype, head_dim: int, device: torch.device) -> list[str]:
    """Block attentions that can do such inputs here; plain torch only where it is alone."""
    able = [
        name
        for name, block in BLOCKS.items()
        if block.missing is None and block.refuses(dtype, head_dim, device) is None
    ]
    return [name for name in able if name != "math"] or able


def print_card(facts: dict[str, Any]) -> None:
    """Print the card before anything is measured."""
    print("-" * 100)
    for name, value in facts.items():
        print(f"{name:<12} {value}")
    print("-" * 100, flush=True)


def write(document: dict[str, Any], path: str | None) -> str:
    """Write the document to a file where asked; return it as one line."""
    text = json.dumps(document)
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text + "\n")
    return text


def last_line(document: dict[str, Any], path: str | None = None) -> None:
    """Print the document as the last line, and write it to a file where asked."""
    print(write(document, path), flush=True)
