"""Ranks, layouts and messages: what a sequence is cut over, and how its parts travel."""

import torch.distributed as dist

if not dist.is_available():
    raise ImportError(
        "lhcp needs torch.distributed, which this build of torch was made without "
        "(torch.distributed.is_available() is False): install one that has it, for one rank too"
    )
