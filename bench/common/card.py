"""The card of a benchmark: hardware, versions, commit and ceilings, printed before any number."""

import os
import platform
from typing import Any

import torch

from bench.common.page import command, today
from lhcp.comm.mesh import Ranks
from lhcp.machine import commit, cpu_name, installed
from lhcp.measure.clock import copy_bandwidth
from lhcp.measure.links import link


def card(device: torch.device, ranks: Ranks) -> dict[str, Any]:
    """Return hardware, versions, commit and ceilings; a collective of all ranks."""
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
        facts["triton"] = installed("triton")
    if ranks.world_size > 1:
        facts["link"] = link(ranks, device)
    return facts


def dated_card(device: torch.device, **more: Any) -> dict[str, Any]:
    """Return the head of a page: date, command, what `more` tells, and this process's card."""
    facts = card(device, Ranks())
    # The card speaks of this process; the ranks that it starts are told by `more`.
    del facts["world_size"], facts["nodes"]
    return {"date": today(), "command": command(), **more, **facts}


def shown_card(device: torch.device, ranks: Ranks, **more: Any) -> dict[str, Any]:
    """Return the card with `more` facts, printed by rank 0; a collective of all ranks."""
    facts = card(device, ranks) | more
    if ranks.rank == 0:
        print("-" * 100)
        for name, value in facts.items():
            print(f"{name:<12} {value}")
        print("-" * 100, flush=True)
    return facts
