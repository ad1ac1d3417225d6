"""Measure a `Calibration`: blocks of attention, copies, merges and links, on these ranks.

    torchrun --nproc-per-node 8 bench/calibrate.py --out b200.json
    python bench/calibrate.py --seqlens 2048 8192 32768 --out gpu.json

The sizes are a GPU's; a CPU takes hours for them, and seconds for these:

    torchrun --nproc-per-node 2 bench/calibrate.py --device cpu --dtype float32 --heads 4 \
        --head-dim 64 --seqlens 256 1024 2048 --queries 256 1024 --keys 256 1024 --out cpu.json

The model then predicts for such a machine: `bench/scaling_model.py --calibration gpu.json`.
"""

import argparse

import torch
import torch.distributed as dist
from harness import card, join, print_card, run_to_exit
from rates import byte_compute, collective_factors, copy_bandwidth, link, long_message, seconds_of

from lhcp.comm.mesh import Ranks
from lhcp.cost.calibration import Calibration, Link
from lhcp.ring.block import BLOCKS, choose_block
from lhcp.ring.merge.merge import Part, merge
from lhcp.ring.rotation.base import wide


def block_seconds(
    name: str,
    queries: int,
    keys: int,
    causal: bool,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
) -> tuple[float, float]:
    """Forward and backward seconds of one block."""
    block, scale = BLOCKS[name], head_dim**-0.5
    q = torch.randn(1, queries, heads, head_dim, dtype=dtype, device=device)
    k, v = torch.randn(2, 1, keys, heads, head_dim, dtype=dtype, device=device)
    dout = torch.randn_like(q)
    out, lse = block.forward(q, k, v, causal, scale)
    return (
        seconds_of(lambda: block.forward(q, k, v, causal, scale), device, repeats),
        seconds_of(lambda: block.backward(dout, q, k, v, out, lse, causal, scale), device, repeats),
    )


def merge_bandwidth(heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> float:
    """Counted bytes a second of the merge of three, so large that its launch does not matter."""
    rows = 2**16 if device.type == "cuda" else 2**12
    out, *parts = torch.zeros(4, 1, rows, heads, head_dim, dtype=dtype, device=device)
    lse, *lses = torch.zeros(4, 1, heads, rows, dtype=wide(dtype), device=device)
    wholes = [Part.whole(*part) for part in zip(parts, lses, strict=True)]
    seconds = seconds_of(lambda: merge(out, lse, wholes), device)
    return 4 * out.nbytes / seconds


def calibrate(
    ranks: Ranks,
    device: torch.device,
    dtype: torch.dtype,
    *,
    heads: int,
    head_dim: int,
    seqlens: list[int],
    queries: list[int],
    keys: list[int],
    backend: str = "auto",
    repeats: int = 7,
    nodes: int = 1,
    large_message: int | None = None,
) -> Calibration:
    """Measure on all ranks at once; the result is rank 0's, the links' the slowest rank's.

    Args:
        seqlens: of the causal squares. queries, keys: of the grid of blocks without a mask; the
            grid may be empty.
        nodes: 1: all ranks share a node; else the ring of all ranks is measured as the outer link.
        large_message: bytes of the long message that gives the bandwidth.
    """
    name = choose_block(backend, dtype, head_dim, device).name
    common = (heads, head_dim, dtype, device, repeats)
    square = [(n, *block_seconds(name, n, n, True, *common)) for n in sorted(seqlens)]
    full = [
        (n, m, *block_seconds(name, n, m, False, *common))
        for n in sorted(queries)
        for m in sorted(keys)
    ]
    tiny = torch.zeros(1, device=device)
    between = Link(latency=0.0, bandwidth=1e18)
    gather_factor, alltoall_factor, taken = 1.0, 1.0, 0.0
    if ranks.world_size > 1:
        large = large_message or long_message(device)
        found = link(ranks, device, large)
        latency, rate = found["latency_us"] / 1e6, 1e9 * found["gb_s"]
        gather_factor, alltoall_factor, empty = collective_factors(ranks, device, rate, large)
        # All of it: the gathers' bandwidth is what remains of their time beside it.
        hop = max(0.0, empty - latency) / (ranks.world_size - 1)
        between = Link(latency=latency, bandwidth=rate, hop=hop)
        if device.type == "cpu":
            block, q = BLOCKS[name], torch.randn(1, square[0][0], heads, head_dim, dtype=dtype)
            taken = byte_compute(lambda: block.forward(q, q, q, True, head_dim**-0.5), rate, ranks)
    cuda = device.type == "cuda"
    title = torch.cuda.get_device_name(device) if cuda else "cpu"
    calibration = Calibration(
        name=title,
        source=f"bench/calibrate.py, torch {torch.__version__}, {name}, {dtype}, "
        f"{ranks.world_size} ranks, {nodes} nodes; inside and between nodes as round the ring",
        num_heads=heads,
        head_dim=head_dim,
        square=tuple(square),
        full=tuple(full),
        copy_bandwidth=copy_bandwidth(device),
        merge_bandwidth=merge_bandwidth(heads, head_dim, dtype, device),
        launch=seconds_of(lambda: tiny.add_(1), device),
        inner=between,
        outer=between,
        gather_factor=gather_factor,
        alltoall_factor=alltoall_factor,
        byte_compute=taken,
    )
    if ranks.world_size > 1:
        said = [calibration]
        dist.broadcast_object_list(said, src=0, group=ranks.flat)
        calibration = said[0]
    return calibration


def measure(args: argparse.Namespace, device: torch.device) -> None:
    ranks = Ranks(dist.group.WORLD) if dist.get_world_size() > 1 else Ranks()
    facts = card(device, ranks)
    if ranks.rank == 0:
        print_card(facts)
    calibration = calibrate(
        ranks,
        device,
        getattr(torch, args.dtype),
        heads=args.heads,
        head_dim=args.head_dim,
        seqlens=args.seqlens,
        queries=args.queries,
        keys=args.keys,
        backend=args.backend,
        nodes=args.nodes,
    )
    if ranks.rank == 0:
        for n, forward, backward in calibration.square:
            print(f"causal {n:>8,}: {1e3 * forward:9.3f} ms forward {1e3 * backward:9.3f} backward")
        for n, m, forward, backward in calibration.full:
            print(f"full {n:>7,} x {m:>8,}: {1e3 * forward:9.3f} ms {1e3 * backward:9.3f}")
        print(f"compute that a byte takes: {1e9 * calibration.byte_compute:.2f} ns")
        calibration.save(args.out)
        print(f"written: {args.out}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="calibration.json")
    parser.add_argument("--seqlens", type=int, nargs="*", default=[2048, 8192, 32768, 65536])
    parser.add_argument("--queries", type=int, nargs="*", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--keys", type=int, nargs="*", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--nodes", type=int, default=1)
    args = parser.parse_args()
    device = join(args.device)
    run_to_exit(lambda: measure(args, device))


if __name__ == "__main__":
    main()
