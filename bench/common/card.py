"""What the benchmarks share: joining, the card, the ceilings, the gate before any number."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from rates import copy_bandwidth, link

from lhcp.comm.layout import LayoutName
from lhcp.comm.mesh import Ranks
from lhcp.comm.sharding import shard
from lhcp.layer.lighthouse import lighthouse_attention
from lhcp.ring.block import BLOCKS
from lhcp.ring.function import ring_attention
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
