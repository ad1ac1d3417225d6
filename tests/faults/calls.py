"""Attention calls of four ranks of which one differs: each is a row of the table."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import lhcp
from lhcp.testing.inputs import small_config
from tests.comm.stalls import Ended, go_astray, run_ranks
from tests.faults.gpus import SHARED, by_nccl
from tests.faults.runs import Outcome

WORLD = 4
BY_NCCL = by_nccl(WORLD)
TIMEOUT = 5.0 if SHARED else 2.0
CONFIG, SEQLEN = small_config(num_strata=2 * WORLD)
LONG = torch.tensor([0, SEQLEN - 1, SEQLEN], dtype=torch.int32)
# A document a chunk: keys travel to nobody, where those of the long one do.
SHORT = torch.arange(0, SEQLEN + 1, SEQLEN // (2 * WORLD), dtype=torch.int32)


def attend(x: Tensor, grad: bool = True, **choices: object) -> Tensor:
    """Attend to x by lighthouse attention."""
    q, k, v = (x.clone().requires_grad_(grad) for _ in range(3))
    options: dict[str, object] = {"config": CONFIG, "group": dist.group.WORLD, "rotation": "p2p"}
    out: Tensor = lhcp.lighthouse_attention(q, k, v, **(options | choices))  # type: ignore[arg-type]
    return out


def step(rank: int, folder: Path, fault: str) -> None:
    """Make calls that all ranks know, forward and backward; then rank 1 does something else."""
    x = torch.randn(1, SEQLEN // WORLD, 2, 8, dtype=torch.float64)
    if BY_NCCL:
        x = torch.randn(1, SEQLEN // WORLD, 2, 64, dtype=torch.bfloat16, device="cuda")
    astray = rank == 1
    with lhcp.Watchdog(timeout=TIMEOUT) as watchdog:
        for scale in (0.1, 0.3):
            attend(x, scale=scale).sum().backward()
        if fault == "documents":
            attend(x, scale=0.1, cu_seqlens=LONG).sum().backward()
        watchdog.at("forward", 6)
        time.sleep(0.3)
        go_astray(folder)
        scale = 0.1
        if fault == "length" and astray:
            x = torch.cat([x, x], 1)
        if fault == "config" and astray:
            attend(x, scale=scale, config=replace(CONFIG, topk=2 * CONFIG.topk))
        elif fault == "gradient":
            attend(x, scale=0.2, grad=not astray)
        elif fault == "documents":
            out = attend(x, scale=scale, cu_seqlens=SHORT if astray else LONG)
        elif fault == "known call" and astray:
            out = attend(x, scale=0.3)
        else:
            out = attend(x, scale=scale)
        if fault == "extra call" and astray:
            attend(x, scale=scale)
        if fault == "hang" and astray:
            time.sleep(60)
        watchdog.at("backward", 6)
        if fault == "backward" and astray:
            out.register_hook(fail)
        if fault == "known call":
            # Until the next message that all ranks make; its call's had equal sizes.
            dist.barrier() if not astray else time.sleep(60)
        out.sum().backward()
        dist.barrier()
        if BY_NCCL:
            # The host waits for the device here; of gloo it waited in each message.
            torch.cuda.synchronize()


def fail(grad: Tensor) -> None:
    """Raise an error of this rank alone."""
    raise ValueError("only here")


def astray(fault: str) -> Callable[[Path], Outcome]:
    """Let rank 1 of four do something else."""

    def provoke(folder: Path) -> Outcome:
        # On a GPU the first calls compile.
        patience = 90.0 if BY_NCCL else 30.0
        ended: list[Ended] = run_ranks(
            folder, WORLD, step, fault, patience=patience, by_nccl=BY_NCCL
        )
        return Outcome(
            [one.code for one in ended],
            [one.said for one in ended],
            max(one.seconds for one in ended),
        )

    return provoke
