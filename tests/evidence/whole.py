"""Selections of ranks, put together to one of the whole sequence; the memory of a process."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench.common.problem import AttentionProblem
from lhcp.comm.mesh import Ranks
from lhcp.lighthouse.select import Selection
from lhcp.reference import ReferenceSelection
from tests.cases import decode, together

Entries = tuple[Tensor, Tensor]
"""Levels of entries and their indices in the whole sequence, int64 [1, Hk, S / W] on the CPU."""


def whole_entries(selection: Selection, problem: AttentionProblem, ranks: Ranks) -> Entries:
    """Return a rank's entries as those of the whole sequence."""
    assert problem.config is not None
    return decode(selection, problem.config, problem.seqlen, "zigzag", ranks.world_size, ranks.rank)


def whole_selection(entries: Sequence[Entries]) -> ReferenceSelection:
    """Put all ranks' `whole_entries` together to one selection."""
    return ReferenceSelection(
        *(together(parts, "zigzag", dim=2) for parts in zip(*entries, strict=True))
    )


def equal(a: ReferenceSelection, b: ReferenceSelection) -> bool:
    """Say whether two selections have the same entries in the same order."""
    return torch.equal(a.levels, b.levels) and torch.equal(a.indices, b.indices)


def peak_mb() -> float:
    """Return the most memory that this process ever had, NaN where the system does not tell.

    Not ru_maxrss: in a process that was started by another it counts what that one had.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return math.nan
    return next((int(x.split()[1]) / 1024 for x in lines if x.startswith("VmHWM")), math.nan)
