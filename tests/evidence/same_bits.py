"""Whether a change keeps every bit: digests of results, stored before it and compared after it.

    python tests/evidence/same_bits.py save build/bits.json       # before the change
    python tests/evidence/same_bits.py compare build/bits.json    # after it

Outputs and gradients of layer and ring, every rotation, W = 1 to 4, float64, float32 and bfloat16,
on gloo ranks of the CPU; with --cuda on the GPUs of torchrun's ranks. Only public names are used,
so that the same file runs on trees whose insides differ. Digests hold on one machine and one torch.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import lhcp
from lhcp.console import escape_unprintable
from lhcp.ring.heads import TWO_AXES
from lhcp.testing.inputs import qkv, small_config

Setting = dict[str, Any]


def rotations(world_size: int, num_nodes: int | None) -> tuple[str, ...]:
    """Rotations that run on such ranks, the package's ring aside."""
    if world_size == 1:
        return ("p2p",)
    if num_nodes is not None:
        return (*TWO_AXES, "p2p")
    return ("p2p", "allgather", "alltoall")


def settings(world_size: int, num_nodes: int | None, cuda: bool) -> Iterator[Setting]:
    """Every case of one world, in an order that never changes."""
    dtypes = ("bfloat16",) if cuda else ("float64", "float32", "bfloat16")
    for rotation in rotations(world_size, num_nodes):
        for layout in ("zigzag", "contiguous"):
            for dtype in dtypes:
                common = {
                    "W": world_size,
                    "nodes": num_nodes,
                    "rotation": rotation,
                    "layout": layout,
                    "dtype": dtype,
                }
                backends = ("cudnn", "flash") if cuda else ("cpu", "math")
                for backend in backends:
                    for causal in (True, False):
                        yield common | {"kind": "ring", "backend": backend, "causal": causal}
                for scorer in ("norm", "dilated"):
                    for backend in backends[:1]:
                        kernels = ["torch"]
                        # The interpreter takes seconds a kernel: a few cases of it.
                        few = world_size <= 2 and dtype == "bfloat16" and layout == "zigzag"
                        if scorer == "norm" and (cuda or few):
                            kernels.append("triton")
                        for name in kernels:
                            yield common | {
                                "kind": "layer",
                                "backend": backend,
                                "scorer": scorer,
                                "kernels": name,
                            }


def digest(x: Tensor) -> str:
    """The bits of a tensor, as 16 characters."""
    raw = x.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw).hexdigest()[:16]


def run_one(group: Any, setting: Setting, device: str) -> dict[str, str]:
    """Run forward and backward of one case on this rank."""
    dtype = getattr(torch, setting["dtype"])
    torch.use_deterministic_algorithms(setting["backend"] == "flash")
    cuda = device != "cpu"
    world_size = setting["W"]
    kv_heads = 2 if world_size == 1 else world_size
    heads, head_dim = 2 * kv_heads, 64 if cuda else 8
    shared = {
        "group": group,
        "layout": setting["layout"],
        "rotation": setting["rotation"],
        "backend": setting["backend"],
    }
    if setting["kind"] == "ring":
        config, seqlen = None, 9600 if cuda else 48
    else:
        config, seqlen = small_config(
            num_strata=2 * world_size, picks=16 if cuda else 2, scorer=setting["scorer"], dilation=2
        )
    whole = qkv(
        seqlen,
        batch=2,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        device=device,
        seed=7,
    )
    q, k, v, do = (lhcp.shard(x, group, layout=setting["layout"]) for x in whole)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    if config is None:
        out, lse = lhcp.ring_attention(q, k, v, causal=setting["causal"], return_lse=True, **shared)
        found = {"out": out, "lse": lse}
    else:
        out = lhcp.lighthouse_attention(
            q, k, v, config=config, kernels=setting["kernels"], **shared
        )
        found = {"out": out}
    grads = torch.autograd.grad(out, (q, k, v), do)
    # cuDNN's backward sums in any order.
    if setting["backend"] != "cudnn":
        found |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
    return {name: digest(x) for name, x in found.items()}


def run_all(
    group: Any, world_size: int, num_nodes: int | None, device: str = "cpu"
) -> dict[str, dict[str, str]]:
    """Run every case of one world on this rank: setting as text -> digests."""
    return {
        json.dumps(setting): run_one(group, setting, device)
        for setting in settings(world_size, num_nodes, device != "cpu")
    }


def on_cpu() -> list[dict[str, Any]]:
    """All worlds, on gloo ranks; one dictionary a rank and world."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from lhcp.testing.ranks import RankPool

    pool = RankPool(4, timeout=400)
    found: list[dict[str, Any]] = []
    try:
        for world_size in (1, 2, 3, 4):
            found += pool.run(run_all, world_size, world_size, None)
        for world_size, nodes in ((2, 2), (3, 3), (4, 2)):
            found += pool.run(run_all, world_size, world_size, nodes, num_nodes=nodes)
    finally:
        pool.close()
    return found


def on_cuda() -> list[dict[str, Any]]:
    """One world of torchrun's ranks, and one rank alone."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}"
    torch.cuda.set_device(device)
    found = [run_all(None, 1, None, device)]
    if world_size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timedelta(seconds=120))
        found.append(run_all(dist.group.WORLD, world_size, None, device))
        everybody: list[Any] = [None] * world_size
        dist.all_gather_object(everybody, found)
        dist.destroy_process_group()
        found = [of_world for of_rank in everybody for of_world in of_rank]
    return found if rank == 0 else []


def main() -> None:
    """Save or compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("save", "compare"))
    parser.add_argument("path", type=Path)
    parser.add_argument("--cuda", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = on_cuda() if args.cuda else on_cpu()
    if not found:
        return
    if args.action == "save":
        args.path.parent.mkdir(parents=True, exist_ok=True)
        args.path.write_text(json.dumps(found, indent=1))
        print(f"{sum(map(len, found))} cases saved")
        return
    before = json.loads(args.path.read_text())
    different = [
        f"{case} {name}"
        for old, new in zip(before, found, strict=True)
        for case in old | new
        for name in old.get(case, {}) | new.get(case, {})
        if old.get(case, {}).get(name) != new.get(case, {}).get(name)
    ]
    print("\n".join(different))
    print(f"{sum(map(len, found))} cases, {len(different)} results differ")
    sys.exit(bool(different))


if __name__ == "__main__":
    escape_unprintable()
    main()
