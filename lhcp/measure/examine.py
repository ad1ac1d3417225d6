"""What this process has to attend with, and what is wrong with it; nothing is sent or timed."""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lhcp.machine import commit, cpu_name, installed, loaded_files, nccl_version

Facts = dict[str, str]
"""What is there, by name."""


@dataclass(frozen=True)
class Trouble:
    """Something that is wrong, and what to do."""

    what: str
    change: str

    def __str__(self) -> str:
        """Return both."""
        return f"{self.what}. {self.change}"


@dataclass(frozen=True)
class Switch:
    """A variable of the environment that slows or breaks a run without a word."""

    name: str
    bad: Callable[[str], bool]
    why: str


ON = ("1", "true", "on", "yes")

SWITCHES = (
    Switch("CUDA_LAUNCH_BLOCKING", lambda v: v == "1", "every launch waits for the GPU"),
    Switch("TRITON_INTERPRET", lambda v: v.lower() in ON, "Triton's kernels are interpreted"),
    Switch("NCCL_P2P_DISABLE", lambda v: v == "1", "GPUs of a node talk through host memory"),
    Switch("NCCL_SHM_DISABLE", lambda v: v == "1", "processes of a node talk through sockets"),
    Switch("NCCL_IB_DISABLE", lambda v: v == "1", "nodes talk through sockets"),
    Switch("NCCL_DEBUG", lambda v: v.upper() == "TRACE", "each call is logged"),
    Switch("TORCH_DISTRIBUTED_DEBUG", lambda v: v.upper() == "DETAIL", "each message is checked"),
    Switch("TORCH_NCCL_BLOCKING_WAIT", lambda v: v == "1", "the host waits for each message"),
    Switch(
        "CUDA_DEVICE_MAX_CONNECTIONS",
        lambda v: v == "1",
        "messages and compute take turns in one queue",
    ),
)


def software(device: torch.device) -> Facts:
    """Return versions, and which libnccl is loaded."""
    facts = {
        "lhcp": f"{installed('lhcp')} {commit()}".strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
    }
    if device.type == "cuda":
        facts["cuda"] = str(torch.version.cuda)
        facts["cudnn"] = str(torch.backends.cudnn.version())
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()[:3]))
        said = [f"{nccl_version(path)} {path}" for path in loaded_files("libnccl.so")]
        facts["libnccl"] = "; ".join(said) or "part of torch"
    return facts


def hardware(device: torch.device) -> Facts:
    """Return the device, its memory and the host."""
    facts = {"cores": f"{usable_cores()} for this process", "cpu": cpu_name()}
    if device.type != "cuda":
        return {"device": "cpu, gloo", "threads": str(torch.get_num_threads()), **facts}
    free, total = torch.cuda.mem_get_info(device)
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "device": f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}",
        "memory": f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free",
        **facts,
    }


def usable_cores() -> int:
    """Return the cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def own_troubles(
    device: torch.device, local_ranks: int, variables: Mapping[str, str]
) -> list[Trouble]:
    """Return what is wrong with this process.

    Args:
        device: that it computes on.
        local_ranks: ranks of this machine.
        variables: of the environment.
    """
    found = [
        Trouble(f"{switch.name}={value}: {switch.why}", f"Unset {switch.name}")
        for switch in SWITCHES
        if (value := variables.get(switch.name, "")) and switch.bad(value)
    ]
    gpus = torch.cuda.device_count()
    if device.type == "cuda":
        if installed("triton") == "none":
            found.append(
                Trouble(
                    "Triton is missing, so the local stages run in plain torch, several times "
                    "slower",
                    "pip install 'lhcp[triton]'",
                )
            )
        versions = {nccl_version(path) for path in loaded_files("libnccl.so")}
        built = ".".join(map(str, torch.cuda.nccl.version()[:3]))
        if len(versions) > 1 or versions - {built}:
            found.append(
                Trouble(
                    f"torch was built with NCCL {built}, and libnccl {', '.join(sorted(versions))} "
                    "is loaded",
                    "Look at LD_LIBRARY_PATH and LD_PRELOAD, and for two packages nvidia-nccl-*",
                )
            )
    elif gpus:
        found.append(
            Trouble(
                f"there are {gpus} GPUs and {local_ranks} ranks here, which compute on the CPU",
                f"Start at most {gpus} ranks a machine",
            )
        )
    elif torch.version.cuda:
        found.append(
            Trouble(
                "torch is built for CUDA and sees no GPU",
                "Look at nvidia-smi, the driver's version and CUDA_VISIBLE_DEVICES",
            )
        )
    threads, cores = torch.get_num_threads(), usable_cores()
    if device.type == "cpu" and local_ranks * threads > cores:
        found.append(
            Trouble(
                f"{local_ranks} ranks with {threads} threads each share {cores} cores, and slow "
                "one another down several times",
                f"Set OMP_NUM_THREADS={max(cores // local_ranks, 1)}, or start fewer ranks",
            )
        )
    return found


def differences(by_rank: Sequence[Facts]) -> list[Trouble]:
    """Return in what ranks differ that should be alike, by their facts."""
    first, found = by_rank[0], []
    for name in ("lhcp", "python", "torch", "triton", "cuda", "cudnn", "nccl", "device"):
        others = {rank: facts.get(name) for rank, facts in enumerate(by_rank)}
        differ = {rank: value for rank, value in others.items() if value != first.get(name)}
        if differ:
            rank, value = next(iter(differ.items()))
            found.append(
                Trouble(
                    f"{name} is {first.get(name)} on rank 0 and {value} on rank {rank} (ranks "
                    f"{sorted(differ)} differ)",
                    "Ranks must choose alike: give all machines the same",
                )
            )
    return found
