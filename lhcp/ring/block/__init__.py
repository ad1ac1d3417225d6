"""Block attention backends: one table, one rule for "auto"."""

import logging
from functools import cache

import torch

from lhcp.ring.block.base import Block
from lhcp.ring.block.math import MATH
from lhcp.ring.block.packages import FA4, FLASH_ATTN
from lhcp.ring.block.torch_ops import CPU, CUDNN, FLASH

BLOCKS: dict[str, Block] = {
    block.name: block for block in (CPU, CUDNN, FLASH, FA4, FLASH_ATTN, MATH)
}

# Fastest first, as measured on an H200 (bench/results): flash-attn-4 takes 4-13% less time than
# cuDNN, and cuDNN about half of the others'.
_PREFERENCE = {
    "cpu": ("cpu", "math"),
    "cuda": ("fa4", "cudnn", "flash_attn", "flash", "math"),
}

_log = logging.getLogger("lhcp")


def choose_block(name: str, dtype: torch.dtype, head_dim: int, device: torch.device) -> Block:
    """Return the backend called `name`, or for "auto" the fastest that can do the inputs.

    "auto" depends on the dtype, head_dim, device type, installed packages and torch's deterministic
    switch alone, so that ranks with equal inputs never differ. An explicit name is never replaced.

    Raises:
        ValueError: no backend has this name, or it cannot do these inputs (the message names
            those that can).
        ImportError: the backend's package is missing or not understood.
    """
    if name == "auto":
        candidates = _PREFERENCE.get(device.type, ("math",))
        for candidate in candidates:
            block = BLOCKS[candidate]
            if block.missing is None and block.refuses(dtype, head_dim, device) is None:
                if not torch.compiler.is_compiling():
                    _announce(candidate, device.type, str(dtype), head_dim)
                return block
        name = "math"
    if name not in BLOCKS:
        raise ValueError(f"backend={name!r}: must be one of auto, {', '.join(BLOCKS)}")
    block = BLOCKS[name]
    if (missing := block.missing) is not None:
        raise ImportError(f"backend={name!r}: {missing}")
    if (reason := block.refuses(dtype, head_dim, device)) is not None:
        able = [
            other.name
            for other in BLOCKS.values()
            if other.missing is None and other.refuses(dtype, head_dim, device) is None
        ]
        raise ValueError(f"backend={name!r}: {reason}; backends that can: {', '.join(able)}")
    return block


@cache
def _announce(name: str, device: str, dtype: str, head_dim: int) -> None:
    _log.info(
        "attention backend %r: the first of %s that can do %s, head_dim %d on %s",
        name,
        _PREFERENCE.get(device),
        dtype,
        head_dim,
        device,
    )
