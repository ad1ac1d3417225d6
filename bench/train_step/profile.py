"""Where one training step's time goes on the device, by groups of kernels."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from bench.train_step.trainer import Trainer
from lhcp.layer.module import Mode

_RULES = (
    (
        "lighthouse stages",
        r"^(pool|cascade|place|gather|gather_backward|scatter|scatter_backward)_kernel",
    ),
    ("attention", r"sdpa|flash|fmha|cudnn|attn|_dot_do_o|convert_dq"),
    ("matrix products", r"gemm|nvjet|cutlass|splitk|cublas"),
    ("norms, RoPE, SwiGLU", r"^triton_"),
    ("optimizer", r"multi_tensor|foreach|adam|lpnorm"),
    ("other", ""),
)
GROUPS = (*(group for group, _ in _RULES), "idle")


def group_of(kernel: str) -> str:
    """Name the group that a kernel's time counts under."""
    return next(group for group, rule in _RULES if re.search(rule, kernel, re.IGNORECASE))


@dataclass(frozen=True)
class Profile:
    """Where one step's time goes on the device, in seconds."""

    groups: dict[str, float]
    """Every one of GROUPS; kernels that overlap count whole, in the group of each."""
    kernels: list[tuple[str, float, int]]
    """Name, seconds and calls, longest first."""

    @classmethod
    def of(cls, events: Sequence[tuple[str, float, float]]) -> "Profile":
        """Sum up kernels given as (name, start, stop) in seconds; idle is the time of none."""
        groups = dict.fromkeys(GROUPS, 0.0)
        kernels: dict[str, list[float]] = defaultdict(list)
        until = min((start for _, start, _ in events), default=0.0)
        for name, start, stop in sorted(events, key=lambda event: event[1]):
            groups[group_of(name)] += stop - start
            kernels[name].append(stop - start)
            groups["idle"] += max(start - until, 0.0)
            until = max(until, stop)
        table = [(name, sum(times), len(times)) for name, times in kernels.items()]
        return cls(groups, sorted(table, key=lambda row: -row[1]))


def profile(trainer: Trainer, batch: tuple[Tensor, Tensor], mode: Mode) -> Profile:
    """Sum up the device time of one step by kernel."""
    cuda = trainer.device.type == "cuda"
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], acc_events=True) as prof:
        trainer.step(*batch, mode)
        if cuda:
            torch.cuda.synchronize()
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    return Profile.of(
        [
            (event.name, event.time_range.start / 1e6, event.time_range.end / 1e6)
            for event in prof.events()
            # Named ranges show up beside the kernels that they enclose.
            if event.device_type == wanted and not getattr(event, "is_user_annotation", False)
        ]
    )
