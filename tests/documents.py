"""Documents that a lighthouse layer can be packed of, by what is hard about them."""

import random

import torch
from torch import Tensor

from lhcp import LighthouseConfig

KINDS = (
    *("one", "at strata", "before strata", "after strata", "of one token", "around windows"),
    *("all that fit", "random 0", "random 1", "random 2"),
)
"""A stratum's edges are those of chunks and ranks too, where there are as many."""


def starts(kind: str, config: LighthouseConfig, seqlen: int, row: int = 0) -> set[int]:
    """First tokens of the documents of one row, its own too; they fit the config."""
    size = seqlen // config.num_strata
    edges, window = range(size, seqlen, size), config.coarsest_window
    near = {
        "one": set[int](),
        "at strata": set(edges),
        "before strata": {edge - 1 for edge in edges},
        "after strata": {edge + 1 for edge in edges},
        "of one token": {edge + i for edge in edges for i in (-1, 0, 1)},
        "around windows": {edge + window + i for edge in edges for i in (-1, 0, 1)},
    }
    if kind in near:
        return {0} | near[kind]
    draw = random.Random(f"{kind} {seqlen} {row}")
    p, found = config.pool_factor, {0}
    for first in range(0, seqlen, size):
        windows = list(range(first, first + size, p))
        count = config.picks if kind == "all that fit" else draw.randint(0, config.picks)
        if first == 0:
            # The row's own first token is in this one.
            windows, count = windows[1:], max(count - 1, 0)
        for w in draw.sample(windows, count):
            found |= {w + i for i in draw.sample(range(p), draw.randint(1, p))}
    return found


def cu_seqlens(kind: str, config: LighthouseConfig, seqlen: int, batch: int = 1) -> Tensor:
    """Documents of rows that differ: each row takes the kind after the one before's."""
    found: list[int] = []
    for row in range(batch):
        of_row = KINDS[(KINDS.index(kind) + row) % len(KINDS)]
        found += [row * seqlen + t for t in sorted(starts(of_row, config, seqlen, row))]
    return torch.tensor([*found, batch * seqlen], dtype=torch.int32)
