"""Our rotations and torch's own `context_parallel` in turn, on the same ranks and tensors.

    torchrun --nproc-per-node 2 -m bench.rotation.torch_ring --seqlens 65536 131072

Dense causal attention, the layout of both zigzag (torch calls it head-tail), forward and backward,
as in bench.rotation.peer_rings. torch's is checked against ours first: each tensor's l2 distance
must be within what two bf16 kernels differ by. It wants GPUs; torch calls it a prototype. The last
line is JSON.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.common.arguments import add_ranks, make_parser, parse
from bench.common.card import shown_card
from bench.common.page import last_line, write
from bench.common.problem import TENSORS, Answers, AttentionProblem, choices
from bench.common.ranks import all_ranks, dtype_of, run_on_ranks
from bench.rotation.peer_rings import in_turn, ours, runner
from lhcp.comm.mesh import Ranks
from lhcp.measure.timings import PHASES
from lhcp.ring.rotation import NAMES

KERNELS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
MOST = 2e-2
"""l2 distance over the norm: two kernels in bf16 are a few 1e-3 apart."""


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--rotations", nargs="*", default=["p2p"], choices=("auto", *NAMES))
    parser.add_argument("--seqlens", type=int, nargs="*", default=[65_536])
    add_ranks(parser)
    parser.add_argument("--kernel", default="cudnn", choices=KERNELS, help="of both")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--calls", type=int, default=3, help="in a row")
    parser.add_argument("--warmup", type=int, default=2)
    return parse(parser)


@contextmanager
def patched(seqlen: int, ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Let F.scaled_dot_product_attention take this rank's part of a sequence."""
    mesh = init_device_mesh(device.type, (ranks.world_size,))
    # It shards what it is given; our tensors are this rank's already.
    sharded = torch.zeros(seqlen, device=device)
    with context_parallel(
        mesh, buffers=[sharded], buffer_seq_dims=[0], no_restore_buffers={sharded}
    ):
        yield


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Call torch's attention on [B, n, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def check(problem: AttentionProblem, inputs: Answers, options: dict[str, Any]) -> dict[str, float]:
    """Return how far torch's tensors are from ours.

    Raises:
        SystemExit: farther than kernels are from one another.
    """
    pairs = zip(problem.answer(inputs, attend), problem.answer(inputs, **options), strict=True)
    far = {
        name: float((theirs.float() - ours.float()).norm() / ours.float().norm())
        for name, (theirs, ours) in zip(TENSORS, pairs, strict=True)
    }
    if not all(distance < MOST for distance in far.values()):
        raise SystemExit(f"torch's context_parallel and ours differ, so nothing is timed: {far}")
    return far


def measure(args: argparse.Namespace, device: torch.device) -> None:
    """Print the card, check, print the table."""
    ranks = all_ranks(device)
    like = AttentionProblem.of(args, dtype_of(args.dtype, device))
    chosen = choices(ranks, args.heads, [args.kernel], args.rotations)
    document: dict[str, Any] = {"card": shown_card(device, ranks), "rows": []}
    for seqlen in args.seqlens:
        problem = replace(like, seqlen=seqlen)
        inputs = problem.own(ranks, device)
        with patched(seqlen, ranks, device), sdpa_kernel(KERNELS[args.kernel]):
            far = check(problem, inputs, chosen[0].options)
            rings = [attend, *map(ours, chosen)]
            runs = [runner(ring, inputs) for ring in rings]
            names = ["context_parallel", *(choice.rotation for choice in chosen)]
            times = in_turn(runs, device, ranks, args)
        for name, of_phase in zip(names, times, strict=True):
            row: dict[str, Any] = {"seqlen": seqlen, "ring": name, "distance": far}
            row["ms"] = {phase: 1e3 * of_phase[phase].median for phase in PHASES}
            row["over_torch"] = {p: of_phase[p].median / times[0][p].median for p in PHASES}
            document["rows"].append(row)
            if ranks.rank == 0:
                cells = "".join(
                    f"{phase} {row['ms'][phase]:9.3f} ({row['over_torch'][phase]:.3f})   "
                    for phase in PHASES
                )
                print(f"N={seqlen:>9,} {name:<18} ms (over torch's) {cells}", flush=True)
                write(document, args.json)
    if ranks.rank == 0:
        last_line(document, args.json)


if __name__ == "__main__":
    run_on_ranks(measure, arguments())
